"""The head as the loss takes it: of every kind of model at hand, of adapters and of shards."""

import copy
import types

import peft
import pytest
import tiny
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional

import sklformat.distill
from sklformat.distill import OutputHead, linear_sparse_kl, output_head, run_to_head
from sklformat.distill.models import heads, outputs
from sklformat.distill.teacher.forward import Teacher

V, B, T = 64, 2, 6
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}
SMALL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
STUDENTS = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, **SMALL},
    "Cohere": {"logit_scale": 0.0625, **SMALL},
    "Granite": {"logits_scaling": 13.0},
    "HyperCLOVAX": {"logits_scaling": 3.0},  # which multiplies, as Granite's divides
    "Phi": {**SMALL},
    "Llama": {"tie_word_embeddings": True},
}


def make(kind, **changes):
    config = getattr(transformers, kind + "Config")(**SIZES, **(STUDENTS[kind] | changes))
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config)
    for parameter in model.parameters():  # biases, too, and logits large enough for a cap
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids_and_targets():
    g = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(V, (B, T), generator=g)
    ids_PK = torch.stack([torch.randperm(V, generator=g)[:3] for _ in range(B * T)])
    return ids_BT, (ids_PK, torch.full((B * T, 3), 1 / 3))


def gradients(model, loss):
    """The loss, and what it gives each parameter that learns."""
    model.zero_grad()
    loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), named


def dense_loss(model, ids_BT, targets):
    logits_PV = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
    ids_PK, probs_PK = targets
    logp_PK = torch.log_softmax(logits_PV.double(), 1).gather(1, ids_PK)
    return (torch.xlogy(probs_PK, probs_PK) - probs_PK * logp_PK).sum() / len(ids_PK)


def chunked_loss(model, ids_BT, targets):
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    hidden_PD = outputs.hidden_states(plain, ids_BT).flatten(0, 1)
    return linear_sparse_kl(hidden_PD, output_head(model), targets, chunk_positions=5)


def root_loss(model, ids_BT, targets):
    hidden_PD, head, balance = run_to_head(model, ids_BT)
    return linear_sparse_kl(hidden_PD, head, targets, chunk_positions=5) + balance


def assert_equal_steps(model):
    """The chunked loss over the head gives the model's own loss and gradients, of all its parameters."""
    ids_BT, targets = ids_and_targets()
    wanted_value, wanted = gradients(model, dense_loss(model, ids_BT, targets))
    for chunked in (chunked_loss, root_loss):
        value, grads = gradients(model, chunked(model, ids_BT, targets))
        assert wanted.keys() == grads.keys()
        torch.testing.assert_close(value.double(), wanted_value.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-5)
    return wanted


@pytest.mark.parametrize("kind", STUDENTS)
def test_students_with_a_cap_a_scale_or_a_bias(kind):
    """The loss sees what the model's own logits are; its gradients are theirs, tied embeddings included."""
    model = make(kind)
    assert_equal_steps(model)
    assert model.training
    assert output_head(model).weight is model.get_output_embeddings().weight


def test_the_bundled_parts_name_what_is_plain():
    """Where nothing but the matrix makes the logits, the head says so."""
    assert output_head(make("Llama")).is_plain
    assert heads.plain_weight(make("Granite", logits_scaling=1.0)) is not None
    assert OutputHead(torch.ones(2, 2), scale=1.0).is_plain
    assert not output_head(make("Phi")).is_plain


def lora(model, *, layers=("lm_head", "q_proj"), **changes):
    """The model under LoRA whose B is not zero any more."""
    values = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "target_modules": list(layers)} | changes
    model = peft.get_peft_model(model, peft.LoraConfig(**values))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Granite", "Phi", "Llama"])
def test_an_adapter_on_the_head_learns(kind):
    """LoRA on the head is part of the loss, and its matrices get their gradients (U8); the weight below gets none."""
    wanted = assert_equal_steps(lora(make(kind, tie_word_embeddings=False)))
    assert 4 == len(wanted)
    assert 2 == sum("lm_head" in name for name in wanted)


def test_two_adapters_at_once_and_none():
    """All active adapters count; with adapters switched off, or merged, the head is one matrix."""
    model = lora(make("Granite", tie_word_embeddings=False))
    model.add_adapter("more", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "more"])
    torch.nn.init.normal_(model.get_output_embeddings().lora_B["more"].weight)
    assert 2 == len(output_head(model).low_rank)
    assert_equal_steps(model)
    with model.disable_adapter():
        assert () == output_head(model).low_rank
    model.merge_adapter()
    assert () == output_head(model).low_rank


def test_a_head_that_is_saved_whole_learns():
    """Of a head in modules_to_save the loss takes the copy that learns."""
    model = lora(make("Phi"), layers=["q_proj"], modules_to_save=["lm_head"])
    wanted = assert_equal_steps(model)
    assert 2 == sum("lm_head" in name for name in wanted)
    model.add_adapter("more", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.set_adapter("more")
    copies = model.get_output_embeddings().modules_to_save
    assert copies["default"].weight is not copies["more"].weight is output_head(model).weight


REFUSED = {
    "dropout": (
        {"lora_dropout": 0.1},
        {},
        r"LoRA on the head of Granite\w+ has lora_dropout 0\.1, which the chunked lo",
    ),
    "DoRA": ({"use_dora": True}, {}, r"the adapter on the head of Granite\w+ is not plain LoRA \(Linear\); leave the"),
    "tied": ({}, {"tie_word_embeddings": True}, r"the head of \w+ is tied to the embedding, and LoRA changes it alone"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_no_matrix_stands_for(name):
    """What the loss would leave out is refused, with what to change."""
    changes, sizes, message = REFUSED[name]
    model = lora(make("Granite", **({"tie_word_embeddings": False} | sizes)), **changes)
    with pytest.raises(ValueError, match=message):
        output_head(model)


def test_a_quantised_head():
    """Integers, or numbers packed into fewer, have no gradient."""
    model = make("Llama", tie_word_embeddings=False)
    layer = model.get_output_embeddings()
    layer.weight = torch.nn.Parameter(torch.ones(V, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"the head of \w+ is quantised \(Linear, torch\.int8\) and gives no gradient"):
        output_head(model)
    layer.weight = torch.nn.Parameter(torch.ones(V * 8, 1))
    with pytest.raises(
        ValueError, match=r"is quantised \(Linear, torch\.float32\) and gives no gradient; leave it out"
    ):
        output_head(model)


def test_what_is_no_head():
    """A wrapper, a head that is no matrix, and logits that the config does not explain are refused by name."""
    model = make("Llama")
    wrapper = types.SimpleNamespace(module=model)
    with pytest.raises(
        ValueError, match="a SimpleNamespace is no causal language model of transformers or peft; of a w"
    ):
        output_head(wrapper)
    odd = copy.deepcopy(model)
    odd.lm_head = torch.nn.Embedding(V, 16)
    with pytest.raises(
        ValueError, match=r"the head of \w+ is a Embedding, not one matrix; use sparse_kl of its logits"
    ):
        output_head(odd)
    odd = make("Granite")
    odd.config.logits_scaling = 2.0
    odd.forward = lambda **named: functional  # something else altogether
    with pytest.raises(ValueError, match=r"the logits of \w+ are not its hidden states times its head with the bias"):
        output_head(odd)
    assert not hasattr(sklformat.distill, "outputhead")
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        sklformat.distill.no_such_name  # noqa: B018


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_a_sharded_student(one_process):
    """Under fully_shard a head is refused where it is a DTensor, and right after the model's own call (U7)."""
    whole, model = make("Gemma2"), make("Gemma2")
    ids_BT, targets = ids_and_targets()
    value, wanted = gradients(whole, chunked_loss(whole, ids_BT, targets))
    untried = copy.deepcopy(model)
    output_head(model)
    for each in (model, untried):
        for layer in each.model.layers:
            fully_shard(layer, mesh=one_process)
        fully_shard(each, mesh=one_process)
    message = r"the head's weight is a DTensor, of which each process holds a part; call the sharded model itself first"
    with pytest.raises(ValueError, match=message):
        output_head(model)
    with pytest.raises(ValueError, match=message):
        linear_sparse_kl(torch.ones(B * T, 16), model.lm_head.weight, targets)
    untried(input_ids=ids_BT, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    with pytest.raises(
        ValueError, match=r"the head of \w+ cannot be tried while the model is sharded; call output_head"
    ):
        output_head(untried)
    for _ in range(2):  # its head is sharded again after each backward pass
        model.zero_grad()
        found_value, found = gradients(model, root_loss(model, ids_BT, targets))
        torch.testing.assert_close(found_value, value)
        assert wanted.keys() == found.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad.full_tensor(), wanted[name])


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("name", ["Llama", "Granite", "Gemma2"])
def test_a_student_that_was_sharded_when_it_was_loaded(one_process, name):
    """Never whole, its head is compared in the first call, which finds its scale; the gradients are the whole one's."""
    model = make(name)
    ids_BT, targets = ids_and_targets()
    value, wanted = gradients(model, dense_loss(model, ids_BT, targets))
    model.zero_grad()
    fully_shard(model, mesh=one_process)
    found_value, found = gradients(model, root_loss(model, ids_BT, targets))
    torch.testing.assert_close(found_value.double(), value.double(), rtol=1e-5, atol=1e-6)
    for part, grad in found.items():
        torch.testing.assert_close(grad.full_tensor(), wanted[part], rtol=1e-3, atol=1e-5)


def test_wrappers_are_called_themselves():
    """Each wrapper's own call runs the model, once for each loss, with one position's logits."""
    model = make("Phi")
    ids_BT, targets = ids_and_targets()
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self, name, inner):
            super().__init__()
            setattr(self, name, inner)
            self.inner = [inner]

        def forward(self, **named):
            output = self.inner[0](**named)
            calls.append(output.logits.shape)
            return output

    wrapped = Wrapper("module", Wrapper("_orig_mod", lora(model)))
    assert_equal = torch.testing.assert_close
    value, grads = gradients(model, root_loss(wrapped, ids_BT, targets))
    wanted_value, wanted = gradients(model, dense_loss(model, ids_BT, targets))
    assert [(B, 1, V)] * 2 == calls
    assert_equal(value.double(), wanted_value)
    assert_equal(grads, wanted, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="a Linear is no causal language model of transformers or peft"):
        run_to_head(torch.nn.Linear(1, 1), ids_BT)


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
def test_the_first_fsdp_is_refused(one_process):
    """Its flat pieces hold no head; the message names what has one."""
    flat = FullyShardedDataParallel(make("Phi"), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="keeps weights in flat pieces, of which no head can be had; use fully_shard"):
        run_to_head(flat, ids_and_targets()[0])


def test_documents_stay_apart_up_to_the_head():
    """With positions that begin at 0 again, the second document's states are what they are alone."""
    model = make("Llama").eval()
    ids_BT, _ = ids_and_targets()
    positions_BT = torch.tensor([[0, 1, 2, 0, 1, 2]] * B)
    together = run_to_head(model, ids_BT, positions_BT)[0].view(B, T, -1)[:, 3:]
    torch.testing.assert_close(together, run_to_head(model, ids_BT[:, 3:])[0].view(B, 3, -1))


def test_heads_that_are_not_called_once():
    """A model that calls its head twice or with other positions is refused, and one whose logits are not the head's."""
    ids_BT, _ = ids_and_targets()
    model = make("Llama")
    hidden_PD = run_to_head(model, ids_BT)[0]
    forward = type(model).forward
    model.forward = lambda **named: forward(model, **named) and forward(model, **named)
    with pytest.raises(ValueError, match=r"Llama\w+ gives its head nothing for inputs \[2, 6\]; use sparse_kl"):
        run_to_head(model, ids_BT)
    model.forward = lambda **named: forward(model, **named, logits_to_keep=2)
    with pytest.raises(ValueError, match=r"gives its head hidden states \[2, 2, 16\] for inputs \[2, 6\]"):
        run_to_head(model, ids_BT)
    del model.forward
    torch.testing.assert_close(run_to_head(model, ids_BT)[0], hidden_PD, rtol=0, atol=0)
    assert {} == {**model._forward_hooks, **model.lm_head._forward_pre_hooks}
    other = make("Llama")
    output_head(other)

    def doubled(**named):
        output = forward(other, **named)
        output.logits = 2 * output.logits
        return output

    other.forward = doubled
    with pytest.raises(ValueError, match=r"the logits of Llama\w+ are not what its head makes of the hidden states"):
        run_to_head(other, ids_BT)


def test_no_other_layers_states_are_kept():
    """Beyond what the backward pass needs, nothing of the layers is held: the call gives one tensor of states."""
    model = make("Llama")
    output_head(model)
    calls = []
    model.register_forward_hook(lambda _model, _inputs, output: calls.append(output.hidden_states))
    hidden_PD, _, _ = run_to_head(model, ids_and_targets()[0])
    assert [[hidden_PD.data_ptr()]] == [[states.data_ptr() for states in given] for given in calls]


def experts(**changes):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **SMALL, **changes)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


def test_the_balancing_loss_is_the_models_own():
    """Where the config asks for it, the loss of the routers comes with the hidden states, with its gradient (U13)."""
    ids_BT, _ = ids_and_targets()
    model = experts(router_aux_loss_coef=0.25, output_router_logits=True)
    body = model.model
    hidden_BTD, balance = outputs.hidden_states_and_balance(model, ids_BT)
    assert body is model.model
    torch.testing.assert_close(hidden_BTD, outputs.hidden_states(model, ids_BT), rtol=0, atol=0)
    torch.testing.assert_close(run_to_head(model, ids_BT)[2], balance)
    wanted = 0.25 * model(input_ids=ids_BT, use_cache=False).aux_loss
    (gate,) = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    torch.testing.assert_close(balance, wanted)
    torch.testing.assert_close(torch.autograd.grad(balance, gate), torch.autograd.grad(wanted, gate))
    positions_BT = torch.tensor([[0, 1, 2, 0, 1, 2]] * B)  # two documents in each sequence
    apart_BTD, balance = outputs.hidden_states_and_balance(model, ids_BT, positions_BT)
    torch.testing.assert_close(apart_BTD, outputs.hidden_states(model, ids_BT, positions_BT), rtol=0, atol=0)
    assert balance > 0


def test_the_balancing_loss_by_other_names():
    """DBRX and JetMoe have the weight elsewhere in their configs; the loss is their own training's."""
    ids_BT, _ = ids_and_targets()
    parts = {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_loss_weight": 0.5},
    }
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 16, "vocab_size": V}
    dbrx = transformers.DbrxConfig(**sizes, **parts, output_router_logits=True, tie_word_embeddings=False)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "kv_channels": 8}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    jetmoe = transformers.JetMoeConfig(**sizes, **SMALL, aux_loss_coef=0.5, output_router_logits=True)
    for kind, config in (("Dbrx", dbrx), ("JetMoe", jetmoe)):
        torch.manual_seed(0)
        model = getattr(transformers, kind + "ForCausalLM")(config)
        _, balance = outputs.hidden_states_and_balance(model, ids_BT)
        whole, bare = (model(input_ids=ids_BT, labels=ids_BT, output_router_logits=on).loss for on in (True, False))
        torch.testing.assert_close(balance, whole - bare, rtol=1e-4, atol=1e-5)
        assert balance > 0


def test_no_balancing_loss_where_none_is_asked_for():
    """A config that does not ask gets none; one that asks a model without such a loss is refused."""
    ids_BT, _ = ids_and_targets()
    for model in (experts(router_aux_loss_coef=0.25), experts(output_router_logits=True, router_aux_loss_coef=0.0)):
        assert outputs.hidden_states_and_balance(model, ids_BT)[1] is None
    model = experts(output_router_logits=True)
    model.forward = lambda **named: types.SimpleNamespace(logits=None)
    with pytest.raises(
        ValueError, match=r"the config of Mixtral\w+ asks for a balancing loss \(router_aux_loss_coef, outp"
    ):
        outputs.hidden_states_and_balance(model, ids_BT)
    model = experts(router_aux_loss_coef=0.25, output_router_logits=True)
    own = type(model).forward
    model.forward = lambda **named: own(model, **named | {"output_router_logits": False})
    with pytest.raises(ValueError, match="asks for a balancing loss"):
        run_to_head(model, ids_BT)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("can't allocate memory")])
def test_short_memory_is_no_other_kind_of_head(monkeypatch, error):
    """Out of memory while a model is tried is said as such; else a capture would quietly take the slowest way."""
    model = tiny.new_model(290).eval()

    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(heads.outputs, "hidden_states", full)
        with pytest.raises(RuntimeError, match=str(error)):
            heads.plain_weight(model)
        with pytest.raises(RuntimeError, match=str(error)):
            Teacher(model, 290)
