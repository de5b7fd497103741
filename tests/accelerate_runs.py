"""Loops of accelerate as processes: what each rank sees of a cache, or the sentence that refuses it, as JSON."""

import functools
import itertools
import json
import warnings

import torch
from torch.utils.data import DataLoader

from sklformat.distill import Batch, SparseLogitDataset, SparseLogitSequences, collate
from sklformat.errors import SklError

DICTS = functools.partial(collate, form="dict", k=10)
"""Ten rounds give at most ten records."""


def first_tokens(batch):
    """The first token of each sequence of a batch: its name."""
    return (batch.input_ids if isinstance(batch, Batch) else batch["input_ids"])[:, 0].tolist()


def seen(loader):
    """The sequences of each step, or what is refused."""
    try:
        return [first_tokens(batch) for batch in loader]
    except (SklError, ValueError) as error:
        return str(error)


def run(path):
    """Every way to have this cache in a loop of accelerate; the first 16 sequences, two or four in a step."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    warnings.simplefilter("ignore")
    part = {"sequences": range(16)}
    early = SparseLogitDataset(path, 2, **part)
    ways = [DataLoaderConfiguration(dispatch_batches=way, use_seedable_sampler=True) for way in (None, False)]
    plain, undispatched = (Accelerator(cpu=True, dataloader_config=way) for way in ways)
    found = {"rank": plain.process_index, "early": seen(early)}

    stream = SparseLogitDataset(path, 2, **part)
    assert plain.prepare(stream) is stream
    batches = list(stream)
    found["stream"] = [first_tokens(batch) for batch in batches]
    stream.load_state_dict(json.loads(json.dumps(batches[1].state)))
    found["stream, resumed"] = seen(DataLoader(stream, batch_size=None))

    sequences = SparseLogitSequences(path, **part)
    for name, collate_fn in (("sequences", collate), ("sequences, dicts", DICTS)):
        loader = plain.prepare(DataLoader(sequences, batch_size=2, shuffle=True, collate_fn=collate_fn))
        found[name] = seen(loader)
        loader.set_epoch(0)
        found[f"{name}, resumed"] = seen(plain.skip_first_batches(loader, 1))

    whole = SparseLogitDataset(path, None, rank=0, world_size=1, **part)
    singles = SparseLogitDataset(path, None, **part)
    two = {"batch_size": 2, "drop_last": True}
    dispatched = plain.prepare(DataLoader(whole, collate_fn=DICTS, **two))
    found["dispatched"] = seen(dispatched)
    dispatched.set_epoch(0)
    found["dispatched, resumed"] = seen(plain.skip_first_batches(dispatched, 1))

    for name, accelerator, loader in (
        ("divided: stream", undispatched, DataLoader(stream, batch_size=None)),
        ("divided: singles", undispatched, DataLoader(singles, collate_fn=DICTS, **two)),
        ("dispatched: singles", plain, DataLoader(singles, collate_fn=DICTS, **two)),
        ("dispatched: stream", plain, DataLoader(stream, batch_size=None)),
        ("dispatched: batches", plain, DataLoader(whole, collate_fn=collate, **two)),
        ("dispatched: whole", plain, DataLoader(SparseLogitDataset(path, 2, rank=0, world_size=1), batch_size=None)),
    ):
        found[name] = seen(accelerator.prepare(loader))
    stream.set_epoch(0)
    found["refused and left out"] = seen(DataLoader(stream, batch_size=None))

    found["trainer: sequences"] = seen(trainer(sequences, path))
    found["trainer: singles"] = seen(trainer(singles, path))

    found["epochs"] = epochs(undispatched, path)
    print(json.dumps(found))


def trainer(dataset, path):
    """The loader that transformers' Trainer makes over a dataset."""
    from transformers import Trainer, TrainingArguments

    settings = {"per_device_train_batch_size": 2, "remove_unused_columns": False, "report_to": [], "use_cpu": True}
    args = TrainingArguments(output_dir=path.parent / "trainer", **settings)
    return Trainer(torch.nn.Linear(1, 1), args, data_collator=DICTS, train_dataset=dataset).get_train_dataloader()


def epochs(accelerator, path):
    """A prepared loader of one process: its epochs, and resuming in the second one."""
    if accelerator.num_processes > 1:
        return None
    stream = SparseLogitDataset(path, 2, sequences=range(16))
    loader = accelerator.prepare(DataLoader(stream, batch_size=None))
    found, states = [], []
    for _ in range(2):
        for batch in loader:
            found.append(first_tokens(batch))
            states.append(batch.state)
    resumed = accelerator.prepare(DataLoader(stream, batch_size=None))
    stream.load_state_dict(states[9])
    refused = seen(resumed)
    resumed.set_epoch(1)
    return {"steps": found, "refused": refused, "resumed": seen(resumed), "stopped": stopped(resumed, stream)}


def stopped(loader, stream):
    """Epoch 1 again, after a loop that was left in the middle."""
    loader.set_epoch(0)
    list(itertools.islice(loader, 2))
    loader.set_epoch(1)
    stream.set_epoch(1)
    return seen(loader)
