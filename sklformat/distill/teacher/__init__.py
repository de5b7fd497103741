"""
Capture of a teacher: text in, a cache out.

arrivals       draws and records on their way from a device to the host
caching        sklformat cache: from the settings to the finished cache
calibration    a short capture, to know what a long one will cost
drawing        records of whole sequences, drawn by C on the host
forward        hidden states, batch after batch of a fixed grid, then logits a slice of positions at a time
gpu_sampler    records on the device that holds the logits
logit_columns  optional columns from the logits: log-probs, entropy
parts          draws from rows of which each process has a part of the ids
provenance     what a shard's header says of its capture
ranks          the processes that capture one cache together
row_draws      draws from rows of logits, and their most probable ids, in torch operations
token_sources  text, a dataset or a token store as packed sequences
"""
