"""Files of other systems: each module reads the kinds of one of them, and writes some.

distillkit  DistillKit: raw rows, written
responses   answers of vLLM and SGLang
"""
