"""
sklformat demo: from text to the paper's table, on two cores without GPU or network.

plan       its sizes, and the settings of the verbs that it calls
processes  independent jobs on a few cores, one process each
report     its table, its checks and the commands behind it
stages     its stages, one after the other
"""
