"""A capture by processes that have a part each of one teacher, as a program; on the side, what it held in memory."""

import json
import os
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from sklformat.cli import main
from sklformat.distill.models import loading
from sklformat.distill.models.identities import model_fingerprint
from sklformat.distill.teacher import caching
from sklformat.distill.teacher.forward import Teacher
from sklformat.distill.teacher.gpu_sampler import DeviceSampler
from sklformat.distill.teacher.ranks import joined

SIZES = {"vocab_size": 131, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
TEACHERS = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "tie_word_embeddings": True},  # tied, and capped
    "Phi": {},  # with a bias
    "Granite": {"logits_scaling": 3.0},
}


class Widths(TorchDispatchMode):
    """Rows of tensors that are as wide as the vocabulary, or as the head: the most of any."""

    def __init__(self, widths):
        super().__init__()
        self.widths, self.most = widths, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] in self.widths:
                self.most = max(self.most, tensor.numel() // tensor.shape[-1])
        return made


def capture(words, widths, path):
    """The command, and the most rows of whole logits that were there while it drew."""
    run, seen = caching.Part.run, Widths(widths)

    def watched(part, hand_over):
        with seen:
            run(part, hand_over)

    caching.Part.run = watched
    try:
        status = main(words)
    finally:
        caching.Part.run = run
    Path(path, f"rows-{os.environ.get('RANK')}.json").write_text(json.dumps(seen.most))
    return status


def write_teachers(path):
    for kind, changes in TEACHERS.items():
        torch.manual_seed(0)
        teacher = getattr(transformers, kind + "ForCausalLM")(
            getattr(transformers, kind + "Config")(**SIZES, **changes)
        )
        for parameter in teacher.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        with loading.quiet():
            teacher.save_pretrained(path / kind)


@torch.inference_mode()
def heads(path):
    """Of each kind of head: the greatest difference of its part to the whole, and whether the fingerprints agree."""
    found = {}
    with joined(tensors=True):
        for kind in TEACHERS:
            whole = loading.load_model(path / kind)
            model = loading.load_model(path / kind, tensor_parallel=2)
            teacher = Teacher(model, SIZES["vocab_size"] - 9, divided=True)
            ids_BT = torch.arange(20)[None]
            wanted_TV = whole(input_ids=ids_BT).logits[0]
            parts = [logits for _, logits in teacher.logits(teacher.run(ids_BT.numpy())[0])]
            shard = teacher.part.shard
            apart = torch.cat(parts) - wanted_TV[:, shard.first : shard.first + parts[0].shape[1]]
            found[kind] = float(apart.abs().max()), model_fingerprint(model) == model_fingerprint(whole)
    Path(path, f"heads-{os.environ['RANK']}.json").write_text(json.dumps(found))
    return 0


def capture_dying(words, draws):
    """The command, in which rank 1 is gone after so many sequences."""
    draw, left = DeviceSampler.draw, [draws]

    def struck(sampler, *given):
        left[0] -= 1
        if left[0] == -1 and os.environ["RANK"] == "1":
            os._exit(9)
        return draw(sampler, *given)

    DeviceSampler.draw = struck
    return main(words)
