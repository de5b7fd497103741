"""
The settings of every verb as dataclasses, one field a flag; imports no torch and runs nothing.

train  sklformat train
"""
