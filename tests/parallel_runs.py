"""A step of students on several processes as a program: their gradients beside those of a dense step in float64."""

import copy
import gc
import json
import warnings

import peft
import torch
import torch.distributed as dist
import transformers
from loader_data import VOCAB
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sklformat.distill import OutputHead, SparseLogitDataset, linear_sparse_kl, output_head, run_to_head, sparse_kl

SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
STUDENTS = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "bias": ("Phi", {}),
    "cap": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5, "tie_word_embeddings": False}),
    "scale, LoRA": ("Granite", {"logits_scaling": 3.0, "tie_word_embeddings": False}),
}


def make(name):
    """The student of a name, with weights that show every part of its head in the logits."""
    kind, changes = STUDENTS[name]
    torch.manual_seed(0)
    student = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**SIZES, **changes))
    if "LoRA" in name:
        student = peft.get_peft_model(student, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head", "q_proj"]))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return student.train()


def run(path):
    """The differences of every student and wrapper, and of what goes wrong where the wrapper is passed by."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    found = {
        name: {"DDP": compared(name, path, replicated), "FSDP2": compared(name, path, divided)} for name in STUDENTS
    }
    found["bias"] |= {"DDP, passed by": compared("bias", path, replicated, passed_by)}
    found["bias"] |= {"DDP, means of means": compared("bias", path, replicated, means_of_means)}
    found["bias"] |= {"FSDP2, head made whole": compared("bias", path, divided, head_made_whole)}
    dist.barrier()
    print(json.dumps(found))


def replicated(student):
    return DistributedDataParallel(student)


def divided(student):
    output_head(student)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (student.get_base_model() if hasattr(student, "get_base_model") else student).base_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(student, mesh=mesh)


def right(root, batch, count):
    hidden_PD, head, balance = run_to_head(root, batch.input_ids)
    return linear_sparse_kl(hidden_PD, head, batch.targets, normaliser=count / dist.get_world_size()) + balance


def passed_by(root, batch, count):
    """What is inside the wrapper is called."""
    hidden_PD = root.module.model(batch.input_ids).last_hidden_state.flatten(0, 1)
    return linear_sparse_kl(
        hidden_PD, output_head(root.module), batch.targets, normaliser=count / dist.get_world_size()
    )


def means_of_means(root, batch, count):
    """Each process divides by its own count."""
    hidden_PD, head, _ = run_to_head(root, batch.input_ids)
    return linear_sparse_kl(hidden_PD, head, batch.targets)


def head_made_whole(root, batch, count):
    """The head is gathered by hand, before the call."""
    head = OutputHead(root.lm_head.weight.full_tensor(), root.lm_head.bias.full_tensor())
    hidden_PD = run_to_head(root, batch.input_ids)[0]
    return linear_sparse_kl(hidden_PD, head, batch.targets, normaliser=count / dist.get_world_size())


def compared(name, path, wrapped, loss_of=right):
    """Of a step's loss and gradients: the greatest difference to the dense step, and between processes; relative."""
    student = make(name)
    dense = copy.deepcopy(student).double()
    whole = next(iter(SparseLogitDataset(path, 4, rank=0, world_size=1)))
    expected = sparse_kl(dense(input_ids=whole.input_ids, use_cache=False).logits.flatten(0, 1), whole.targets)
    expected.backward()
    wanted = {key: p.grad for key, p in dense.named_parameters() if p.grad is not None}
    batch = next(iter(SparseLogitDataset(path, 2)))
    count = (batch.labels != -100).sum()
    dist.all_reduce(count)
    root = wrapped(student)
    for _ in range(2):  # what the first step leaves behind must not show in the second
        root.zero_grad()
        loss = loss_of(root, batch, count)
        loss.backward()
    value = loss.detach() / dist.get_world_size()
    dist.all_reduce(value)
    greatest = max(float(grad.abs().max()) for grad in wanted.values())
    wrong = apart = 0.0
    for key, parameter in student.named_parameters():
        if key in wanted:
            grad = parameter.grad
            grad = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).contiguous()
            others = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
            dist.all_gather(others, grad)
            apart = max(apart, *(float((other - grad).abs().max()) for other in others))
            wrong = max(wrong, float((grad.double() - wanted[key]).abs().max()))
    return {
        "loss": abs(float(value) / float(expected) - 1),
        "gradient": wrong / greatest,
        "between processes": apart / greatest,
        "names": sorted(key for key, p in student.named_parameters() if p.grad is not None) == sorted(wanted),
    }


def train_and_look(place):
    """Two steps of ``sklformat train``; on stdout, how many of DDP's wrappers there are when its group ends."""
    from sklformat.distill.student.training import train
    from sklformat.settings.train import TrainConfig

    destroy = dist.destroy_process_group

    def look():
        print(sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects()))
        destroy()

    dist.destroy_process_group = look
    config = TrainConfig(
        out=place / "run", tokens=place / "tokens", tokenizer=str(place / "tokenizer"), seq_len=16, method="ce",
        hidden_size=16, num_layers=1, num_heads=2, steps=2, batch_size=2, device="cpu",
    )  # fmt: skip
    train(config, report=lambda *_: None)
