"""
The settings of every verb as dataclasses, one field per flag; imports no torch and runs nothing.

cache       sklformat cache
convert     sklformat convert
demo        sklformat demo
estimate    sklformat estimate
eval        sklformat eval
files       which files are read as text, and how
inspection  sklformat inspect, view, verify, recover, check and plot
limits      what numbers a setting may have
operations  sklformat merge, slice and subsample
rescore     sklformat rescore
text        what several verbs say of text
train       sklformat train
"""
