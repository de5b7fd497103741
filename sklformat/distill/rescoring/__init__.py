"""
Another teacher on the records of a cache: its log-probs at their ids, and the weights that make them its own.

headers    what a rescored cache says of both teachers
passes     sklformat rescore: one pass with the teacher, one for the weights
questions  the sequences of a cache as a teacher is asked about them
scores     log-probs of given ids, row by row
served     the same of a teacher that vLLM runs
weights    importance weights
"""
