"""
docs/recipes/torchtitan_kd.py in torchtitan's own trainer, as processes on the CPU: what each rank saw, as JSON.

torchtitan is made for accelerators, and for a torch after 2.13.  What a CPU has not got is stood in for here: the
monitor of device memory, attention by flex kernels, ``torch.distributed.set_timeout``, gloo's sum that also multiplies.
All else is torchtitan's: its trainer, FSDP, optimizer, chunks and checkpoints.
"""

import json
import sys
from pathlib import Path

import torch
import torch._utils
from torch.distributed.fsdp import FSDPModule

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
POSITIONS, CHUNKS = 16, 4


class NoMemory:
    """A device whose memory is not watched."""

    device_name = "cpu"

    def reset_peak_stats(self):
        pass

    def get_peak_stats(self):
        from torchtitan.components.metrics import DeviceMemStats

        return DeviceMemStats(*[0] * len(DeviceMemStats._fields))


def recipe():
    """The recipe as a module, after torchtitan was told that there is a CPU."""
    torch._utils._get_available_device_type = lambda: "cpu"
    torch.cpu.current_device = lambda: 0
    if str(RECIPES) not in sys.path:
        sys.path.append(str(RECIPES))
    import torchtitan.components.metrics
    import torchtitan.distributed.utils
    import torchtitan.trainer
    import torchtitan_kd

    torchtitan.components.metrics.build_device_memory_monitor = NoMemory
    torchtitan.distributed.utils.set_pg_timeouts = lambda **_: None
    torchtitan.trainer.time.sleep = lambda _: None  # two seconds after every training
    return torchtitan_kd


def settings(place, out):
    """A debug model of one layer and a cache, as the recipe sets them up."""
    config = recipe().llama3_debugmodel()
    from torchtitan.models.common.attention import ScaledDotProductAttention

    model = config.model_spec.model
    model.layers = model.layers[:1]
    model.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()
    config.hf_assets_path, config.dump_folder = str(place / "tokenizer"), str(out)
    config.dataloader.dataset_path = str(place / "cache")
    config.parallelism.spmd_backend = "partial_dtensor"  # the default needs a later torch on several processes
    config.training.seq_len, config.training.steps = POSITIONS, 4
    config.training.mixed_precision_param = "float32"
    config.loss.num_chunks = CHUNKS
    config.checkpoint.enable, config.checkpoint.interval = True, 2
    config.debug.seed = 0
    return config


def train(place, out, batch_size):
    """Four steps, or what a checkpoint in ``out`` leaves of them: print the sequences, the losses and the weights."""
    config = settings(place, out)
    config.training.local_batch_size = batch_size
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    seen, losses = [], []
    batches, log = trainer.batch_generator, trainer.metrics_processor.log

    def watched(loader):
        for inputs, labels in batches(loader):
            seen.append(inputs["input"][:, 0].tolist())
            yield inputs, labels

    def logged(step, loss, *rest, **named):
        losses.append(loss)
        log(step, loss, *rest, **named)

    trainer.batch_generator, trainer.metrics_processor.log = watched, logged
    trainer.train()
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model_parts[0].parameters())
    weights = [weight.detach().flatten()[:64].tolist() for weight in whole]
    print(json.dumps({"seen": seen, "losses": losses, "weights": weights}))
    trainer.close()
    torch.distributed.destroy_process_group()
