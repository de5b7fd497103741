"""
Other engines as teachers: they run the model, we draw inside their workers.

assembly   rows as they come, put together to whole sequences
desk       the driving process's end of the line: answers questions, keeps what workers send
feed       sequences into an engine, and their records out of it, in order
hooks      where the model runners of vLLM have the rows of prompts
messages   what the driving process and a worker say to each other
plugin     what vLLM calls in each of its processes
rehearsal  two short prompts: what the worker sees against what vLLM itself says
serving    sklformat cache by the engine that was asked for
vllm       the door to vLLM: its engine and its classes
worker     inside a worker of the engine: draws from rows, and sends the records
"""
