"""Files of other systems: each module reads the kinds of one of them, and writes some.

axolotl      Axolotl's data sets for distillation
distillkit   DistillKit and open-instruct: rows in a codec, or raw
eullm        eullm's teacher cache
lines        JSON lines of NeMo-Aligner, slime and EasyDistill
llama_cpp    llama.cpp's base logits
maxtext      MaxText's ArrayRecord files
megatron     Megatron: top-k log-probs in tars, read and written
miniplm      MiniPLM's sparse KD fork
polynomials  DistillKit's codecs
responses    answers of vLLM and SGLang
sampledkd    SampledKD: draws in torch files, found by their tokens
tensors      stacked tensors of Whittle and NeMo Automodel
"""
