"""Files of other systems: each module reads the kinds of one of them, and writes some.

distillkit  DistillKit: raw rows, written
llama_cpp   llama.cpp's base logits
responses   answers of vLLM and SGLang
"""
