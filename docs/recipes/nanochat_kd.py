"""
Train nanochat from a cache: put this file beside nanochat's own as nanochat/nanochat_kd.py, and change two places.

In nanochat/gpt.py, in ``GPT.forward``, before the line that computes ``logits``::

    if isinstance(targets, tuple):
        from nanochat.nanochat_kd import distillation_loss
        return distillation_loss(x, self.lm_head.weight[: self.config.vocab_size], targets)

In scripts/base_train.py, for ``train_loader = tokenizing_distributed_data_loader_...(...)``::

    from nanochat.nanochat_kd import cached_batches
    train_loader = cached_batches(CACHE, args.device_batch_size, args.max_seq_len, device, dataloader_resume_state_dict)

All else stays: ``x, y, dataloader_state_dict = next(train_loader)``, ``loss = model(x, y)``, and the validation, which
hands tokens to ``forward`` as before.  The teacher and nanochat's tokenizer must have the same tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sklformat.distill import OutputHead, SparseLogitDataset, linear_sparse_kl

SOFTCAP = 15.0  # as in GPT.forward
RECORDS = 64  # room at each position: always the same, since nanochat compiles the model for one shape


def cached_batches(
    cache: str, batch_size: int, seq_len: int, device: torch.device | str, resume: dict[str, Any] | None = None
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], dict[str, Any]]]:
    """
    The batches of a cache, epoch after epoch: x [B, T], y the ids and probs [B, T, K] of the teacher, and a state.

    nanochat saves the state of a batch that it has fetched and not yet trained on, so the state is the one before it.
    """
    dataset = SparseLogitDataset(cache, batch_size)
    stored = dataset.cache.header.seq_len
    if stored != seq_len:
        raise ValueError(f"the cache has sequences of {stored} positions; give --max-seq-len {stored}")
    if dataset.isolated:
        raise ValueError("the cache's documents did not see each other, and nanochat's do; make it without isolation")
    if resume is not None:
        dataset.load_state_dict(resume)
    state = dataset.state_dict()
    epoch = state["epoch"]
    while True:
        dataset.set_epoch(epoch)  # after load_state_dict: the rest of its epoch
        for batch in DataLoader(dataset, batch_size=None):
            ids, probs, rest = batch.padded(RECORDS)
            if rest.any():
                raise ValueError(f"a position has more than {RECORDS} records; raise RECORDS, cutting them is biased")
            yield batch.input_ids.to(device), (ids.to(device), probs.to(device)), state
            state = batch.state
        epoch += 1


@torch.compiler.disable
def distillation_loss(hidden: Tensor, weight: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """
    The loss of hidden states [B, T, D] under nanochat's head, whose logits never exist whole.

    Divided by all B T positions, so that micro-batches and ranks, of which nanochat takes the mean, add up exactly.
    """
    head = OutputHead(weight.to(hidden.dtype), softcap=SOFTCAP)
    return linear_sparse_kl(hidden.flatten(0, 1), head, targets, normaliser=hidden.shape[0] * hidden.shape[1])
