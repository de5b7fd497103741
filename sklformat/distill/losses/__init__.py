"""
Losses and metrics on plain tensors; knows nothing else of sklformat.

arguments    what a loss is asked for, checked once
confidence   higher rates for hard tokens: weights by the teacher's confidence
dense        whole distributions of a block of rows
divergences  how far the student is from a target
heads        a model's head: weight, bias, scale, cap
kl           sparse_kl and linear_sparse_kl
methods      each distillation method as one row form
metrics      LM loss, calibration, agreement with the teacher
operators    the losses as operators of torch, with the gradient computed in the forward pass
rows         one dense pass over blocks of logits: the loss and, in place, its gradient
sums         what the metrics are made of, over many batches and processes
targets      the forms of target distributions: ragged, padded, dense
"""
