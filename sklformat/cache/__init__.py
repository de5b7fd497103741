"""
Shards and caches on disk: written so that nothing acknowledged is lost, checked before they are believed.

contents      which shards a cache has, by its manifest or by names
manifest      which shards a cache has, as a file beside them
misalignment  why tokens are not those that records were captured on
payloads      many sequences at once, as the arrays of a training step
reader        a cache: one shard, or a directory of them
recovery      what a crash left of an unsealed shard
report        what a cache holds and what is wrong with it, as plain data
shard         one sealed shard
sharding      write a cache of many shards, or resume it
tokens        the training program's own tokens, whatever holds them
writer        write one shard, or resume what a crash left of it
"""
