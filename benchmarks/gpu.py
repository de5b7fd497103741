"""
What kernels, draws, losses, records, capture and training take on a GPU, beside what else does the same there.

Everything is made here; nothing is loaded from a network.  Each result is checked before it is timed.  Peers that are
not installed (FlashInfer, Liger, cut-cross-entropy) are left out.  About five minutes on an H100:

    python benchmarks/gpu.py [--only kernels draws losses records capture training]

``--device cpu --tiny`` shows on a machine without a GPU that it runs; its figures mean nothing.
"""

import argparse
import importlib
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from declared import DECODE, KERNELS
from sparse_kl_step import Records, sparse_records
from torch.nn import functional

import sklformat as skl
from sklformat import native
from sklformat.capture import Capture
from sklformat.distill import DenseTeacher, SparseLogitDataset, kernels, linear_sparse_kl, run_to_head
from sklformat.distill.models import loading
from sklformat.distill.models.devices import to_device
from sklformat.distill.teacher.forward import Teacher
from sklformat.distill.teacher.gpu_sampler import DeviceSampler
from sklformat.format.header import Header

ROUNDS = 50


@dataclass(frozen=True)
class Sizes:
    vocab_size: int = 128_256
    decoded: int = 1 << 18
    draw_rows: int = 2048
    losses: tuple = ((8192, 1024), (8192, 4096), (32_768, 4096))
    teacher: dict = field(default_factory=lambda: {"hidden_size": 3072, "num_layers": 28, "num_heads": 24})
    student: dict = field(default_factory=lambda: {"hidden_size": 1024, "num_layers": 16, "num_heads": 16})
    seq_len: int = 1024
    sequences: int = 64
    batch: int = 16
    steps: int = 12
    rounds: int = 9


TINY = Sizes(
    vocab_size=600,
    decoded=20,
    draw_rows=3,
    losses=((16, 8),),
    teacher={"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    student={"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    seq_len=16,
    sequences=4,
    batch=2,
    steps=2,
    rounds=1,
)


class Bench:
    """A device with a clock for it."""

    def __init__(self, device, sizes):
        self.device, self.sizes, self.on_gpu = torch.device(device), sizes, device != "cpu"

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run):
        """Median of some runs after two that warm up."""
        for _ in range(2 if self.on_gpu else 0):
            run()
        times = []
        for _ in range(self.sizes.rounds):
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def peak_gib(self, run):
        """What a run holds at most beside what was there before, its results included."""
        if not self.on_gpu:
            return float("nan")
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def randn(self, *shape, seed=0, dtype=torch.bfloat16):
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=g, device=self.device).to(dtype)


def peer(module, name):
    """Something of another package, or None where it is not installed."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


# --- kernels ---------------------------------------------------------------------------------------------------------


def each_kernel(bench, _directory):
    """As they are declared: checked on a few rows of full width in each type, timed whole in one of the halves."""
    table("kernels, against a copy of as many bytes", "ms", "GB/s", "of a copy")
    if not kernels.run_on(bench.device):
        line("none runs here")
        return
    for name, kernel in KERNELS.items():
        variant, few = next(iter(kernel.variants)), {axis: min(size, 64) for axis, size in kernel.full.items()}
        few |= {axis: kernel.full[axis] for axis in ("V", "K") if axis in few}
        for dtype in kernel.dtypes:
            kernel.check(few, dtype, str(bench.device), variant)
        dtype, settings = kernel.dtypes[min(1, len(kernel.dtypes) - 1)], kernel.variants[variant]
        given = kernel.given(kernel.full, dtype, str(bench.device), settings)
        taken = bench.seconds(lambda given=given, kernel=kernel, settings=settings: kernel.run(**given, **settings))
        moved = kernel.bytes_moved(kernel.full, dtype)
        source = torch.empty(moved // 2, dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        copied = bench.seconds(lambda source=source, target=target: target.copy_(source))
        line(f"{name}, {variant}", f"{1e3 * taken:.2f}", f"{moved / taken / 1e9:,.0f}", f"{copied / taken:.2f}")


# --- draws -----------------------------------------------------------------------------------------------------------


@contextmanager
def torch_operations():
    """The draws as torch operations make them, whatever is installed."""
    used = kernels.run_on
    kernels.run_on = lambda _device: False
    try:
        yield
    finally:
        kernels.run_on = used


def draws(bench, _directory):
    size = bench.sizes
    logits = (3 * bench.randn(size.draw_rows, size.vocab_size, dtype=torch.float32)).bfloat16()

    def draw(sampler):
        return DeviceSampler(sampler=sampler, rounds=ROUNDS, seed=0).draw(0, len(logits), [(0, logits)]).result()

    few = logits[: min(64, len(logits))].cpu()
    for sampler in ("multinomial", "systematic"):
        found, expected = draw(sampler)[: len(few)], skl.draw(few, rounds=ROUNDS, sampler=sampler, seed=0, sequence=0)
        ids = np.repeat(expected.token_ids, expected.counts).reshape(len(few), ROUNDS)
        same = float((found == ids).mean())
        print(f"draws equal to C's, {sampler}: {same:.4%}")
        assert same > 0.999, sampler
    read = bench.seconds(lambda: logits.amax(1))
    ways = {"one read (amax)": lambda: logits.amax(1)}
    for sampler in ("multinomial", "systematic"):
        ways[f"DeviceSampler, {sampler}"] = lambda sampler=sampler: draw(sampler)
    ways["torch softmax + multinomial"] = lambda: logits.float().softmax(1).multinomial(ROUNDS, replacement=True)
    flashinfer = peer("flashinfer.sampling", "sampling_from_probs")
    if flashinfer is not None:
        probs = logits.float().softmax(1)
        ways[f"FlashInfer, {ROUNDS} times"] = lambda: [flashinfer(probs) for _ in range(ROUNDS)]
    table(f"draws: {len(logits)} rows, V {size.vocab_size}, {ROUNDS} rounds, bfloat16", "M positions/s", "of one read")
    for name, run in ways.items():
        taken = bench.seconds(run)
        line(name, f"{len(logits) / taken / 1e6:.3f}", f"{read / taken:.2f}")
    with torch_operations():
        taken = bench.seconds(lambda: draw("multinomial"))
    line("torch operations, multinomial", f"{len(logits) / taken / 1e6:.3f}", f"{read / taken:.2f}")


# --- losses ----------------------------------------------------------------------------------------------------------


def losses(bench, _directory):
    for positions, width in bench.sizes.losses:
        table(f"loss: P {positions}, D {width}, V {bench.sizes.vocab_size}, bfloat16", "ms", "of products", "peak GiB")
        loss_of(bench, positions, width)


def loss_of(bench, positions, width):
    vocab_size, device = bench.sizes.vocab_size, bench.device
    hidden = bench.randn(positions, width).requires_grad_()
    weight = (bench.randn(vocab_size, width, seed=1) / width**0.5).requires_grad_()
    on_host = sparse_records(positions, vocab_size, 12, torch.Generator().manual_seed(0))
    records = Records(on_host.token_ids.to(device), on_host.probs.to(device), on_host.offsets.to(device))
    labels = torch.randint(vocab_size, (positions,), generator=torch.Generator().manual_seed(2)).to(device)
    teacher = DenseTeacher(bench.randn(positions, width, seed=3), bench.randn(vocab_size, width, seed=4) / width**0.5)
    check_loss(hidden[:64], weight, on_host, device)
    grad = torch.empty(min(positions, 4096), vocab_size, dtype=hidden.dtype, device=device)

    def products(number):
        with torch.no_grad():
            for start in range(0, positions, len(grad)):
                part = hidden[start : start + len(grad)]
                x = torch.mm(part, weight.T, out=grad[: len(part)])
                if number == 4:
                    torch.mm(part, weight.T, out=grad[: len(part)])
                torch.mm(x, weight)
                torch.mm(x.T, part)

    def step(loss_of_step):
        def run():
            hidden.grad = weight.grad = None
            loss_of_step().backward()

        return run

    ways = {
        "sparse KL": step(lambda: linear_sparse_kl(hidden, weight, records)),
        "one record (cross-entropy)": step(
            lambda: linear_sparse_kl(
                hidden,
                weight,
                Records(labels.int(), torch.ones(positions, device=device), torch.arange(positions + 1, device=device)),
            )
        ),
        "sparse KL, sum in the weight's type": step(
            lambda: linear_sparse_kl(hidden, weight, records, accumulate="weight")
        ),
        "dense teacher": step(lambda: linear_sparse_kl(hidden, weight, teacher, method="full")),
    }
    if hasattr(functional, "linear_cross_entropy"):
        ways["torch linear_cross_entropy"] = step(lambda: functional.linear_cross_entropy(hidden, weight, labels))
    if positions <= 8192:
        ways["torch cross_entropy"] = step(lambda: functional.cross_entropy((hidden @ weight.T).float(), labels))
    liger = peer("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    if liger is not None:
        ways["Liger FLCE"] = step(lambda: liger()(weight, hidden, labels))
    divergence = peer("liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss")
    if divergence is not None and positions <= 8192:
        probs = (teacher.hidden_PD @ teacher.head.T).float().softmax(1).to(hidden.dtype)
        ways["Liger fused linear KL"] = step(lambda: divergence()(hidden, weight, probs))
    cut = peer("cut_cross_entropy", "linear_cross_entropy")
    if cut is not None:
        ways["cut cross-entropy"] = step(lambda: cut(hidden, weight, labels))
    three = bench.seconds(lambda: products(3))
    line("three products alone", f"{1e3 * three:.1f}", "1.00")
    line("four products alone", f"{1e3 * bench.seconds(lambda: products(4)):.1f}")
    for name, run in ways.items():
        taken = bench.seconds(run)
        hidden.grad = weight.grad = None
        line(name, f"{1e3 * taken:.1f}", f"{taken / three:.2f}", f"{bench.peak_gib(run):.2f}")


def check_loss(hidden, weight, records, device):
    """Value and gradient of the first positions are those of dense float64."""
    positions, end = len(hidden), int(records.offsets[len(hidden)])
    few = Records(records.token_ids[:end], records.probs[:end], records.offsets[: positions + 1])
    ours = hidden.detach().clone().requires_grad_()
    on_device = Records(few.token_ids.to(device), few.probs.to(device), few.offsets.to(device))
    loss = linear_sparse_kl(ours, weight.detach(), on_device)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    log_p = (exact @ weight.detach().double().T).log_softmax(1)
    rows = torch.repeat_interleave(few.offsets.diff()).to(device)
    t = few.probs.double().to(device)
    value = (t * (t.log() - log_p[rows, few.token_ids.long().to(device)])).sum() / positions
    value.backward()
    found, expected = loss.item(), value.item()
    assert abs(found - expected) < 2e-2 * abs(expected), (found, expected)
    assert float((ours.grad - exact.grad).abs().max()) < 2e-2 * float(exact.grad.abs().max())


# --- records ---------------------------------------------------------------------------------------------------------


def records(bench, _directory):
    """What decoding costs a step: the way of the bytes and the device's work, or the host's work and a longer way."""
    shape, settings = {"P": bench.sizes.decoded, "K": 24}, DECODE.variants["R24"]
    on_host = DECODE.given(shape, torch.uint8, "cpu", settings)
    if bench.on_gpu:
        on_host = {name: tensor.pin_memory() for name, tensor in on_host.items()}
    on_device = {name: tensor.to(bench.device) for name, tensor in on_host.items()}
    num_records = int(on_host["offsets"][-1])
    numbers = on_host["offsets"].diff().numpy().astype("<u2").view(np.uint8)
    payload = np.concatenate([numbers, on_host["records"].numpy(), np.zeros(64, np.uint8)])
    of_payload = native.Shape(1, 1, 2, 0, 0, settings["vocab_size"], settings["rounds"], shape["P"], num_records)
    decoded = [torch.empty(num_records, dtype=dtype) for dtype in (torch.int32, torch.float32)]
    decoded = [tensor.pin_memory() if bench.on_gpu else tensor for tensor in decoded]

    def move(*tensors):
        return [tensor.to(bench.device, non_blocking=True) for tensor in tensors]

    ways = {
        "stored bytes to the device": lambda: move(*on_host.values()),
        "decoded there, torch operations": lambda: DECODE.reference(**on_device, **settings),
        "decoded by C on one core": lambda: native.decode(of_payload, payload),
        "ids and probabilities to the device": lambda: move(*decoded, on_host["offsets"]),
    }
    if kernels.run_on(bench.device):
        ways["decoded there, kernel"] = lambda: DECODE.run(**on_device, **settings)
    table(f"records: {shape['P']:,} positions, R24", "ms", "M positions/s")
    for name, run in ways.items():
        taken = bench.seconds(run)
        line(name, f"{1e3 * taken:.2f}", f"{shape['P'] / taken / 1e6:.1f}")


# --- capture and training --------------------------------------------------------------------------------------------


def llama(bench, settings, *, seed):
    size = bench.sizes
    made = loading.new_llama(vocab_size=size.vocab_size, max_positions=size.seq_len, seed=seed, **settings)
    return made.to(bench.device, torch.bfloat16)


def random_tokens(size):
    return np.random.default_rng(0).integers(0, size.vocab_size, (size.sequences, size.seq_len + 1)).astype(np.uint32)


def run_teacher(teacher, tokens, size, take):
    for first in range(0, len(tokens), size.batch):
        for place, output in enumerate(teacher.run(tokens[first : first + size.batch, :-1])):
            take(first + place, output)


def capture_into(teacher, tokens, size, directory):
    """As the verb does: the device moves to the next sequence before the host asks for the last one's draws."""
    header = Header(vocab_size=size.vocab_size, seq_len=size.seq_len, kind="counts", rounds=ROUNDS)
    sampler = DeviceSampler(sampler="multinomial", rounds=ROUNDS, seed=0)
    with Capture(directory, header=header, num_sequences=len(tokens), sequences_per_shard=len(tokens)) as writer:
        queued = []

        def push():
            number, drawn = queued.pop(0)
            writer.push_draws(number, tokens[number], drawn.result())

        def take(number, output):
            queued.append((number, sampler.draw(number, size.seq_len, teacher.logits(output))))
            if len(queued) > 1:
                push()

        run_teacher(teacher, tokens, size, take)
        push()
    return writer.wait_seconds


def capture(bench, directory):
    size, tokens = bench.sizes, random_tokens(bench.sizes)
    teacher = Teacher(llama(bench, size.teacher, seed=0).eval(), size.vocab_size)

    def alone(_number, output):
        for _ in teacher.logits(output):
            pass

    times, waited = {"the teacher with its head": [], "capture": []}, 0.0
    run_teacher(teacher, tokens[: size.batch], size, alone)
    capture_into(teacher, tokens[: size.batch], size, directory / "warm")
    for number in range(min(size.rounds, 3)):
        bench.wait()
        begin = time.perf_counter()
        run_teacher(teacher, tokens, size, alone)
        bench.wait()
        times["the teacher with its head"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        waited += capture_into(teacher, tokens, size, directory / f"cache-{number}")
        times["capture"].append(time.perf_counter() - begin)
    positions = tokens.shape[0] * size.seq_len
    table(
        f"capture: {size.sequences} sequences of {size.seq_len}, batches of {size.batch}",
        "positions/s",
        "of alone",
        "for the ring",
    )
    alone_seconds = statistics.median(times["the teacher with its head"])
    for name, taken in times.items():
        seconds = statistics.median(taken)
        share = waited / sum(taken) if name == "capture" else 0.0
        line(name, f"{positions / seconds:,.0f}", f"{alone_seconds / seconds:.3f}", f"{share:.1%}")


def training(bench, directory):
    size = bench.sizes
    cache = directory / "cache-0"
    if not cache.exists():
        capture(bench, directory)
    teacher = llama(bench, size.teacher, seed=0).eval()
    table(f"training: a student of {size.student}, batches of {size.batch}", "tokens/s", "of CE", "for data")
    of_ce = None
    for name in ("CE", "random sampling", "FullKD"):
        taken, waited = train_steps(bench, cache, teacher, name)
        rate = size.steps * size.batch * size.seq_len / taken
        of_ce = of_ce or rate
        line(name, f"{rate:,.0f}", f"{rate / of_ce:.2f}", f"{waited / taken:.1%}")


def train_steps(bench, cache, teacher, name):
    """Seconds of the steps, and those spent waiting for batches."""
    size, device = bench.sizes, bench.device
    student = llama(bench, size.student, seed=1).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=bench.on_gpu)
    decode = "cuda" if bench.on_gpu else "cpu"
    batches = stream(SparseLogitDataset(cache, batch_size=size.batch, seed=0, tail="wrap", decode=decode))
    waited = begin = 0.0
    for number in range(size.steps + 2):
        if number == 2:  # after those that warm up
            bench.wait()
            waited, begin = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        batch = to_device(batch, device)
        targets, labels = batch.targets, batch.labels.flatten()
        if name == "CE":
            places = torch.arange(len(labels) + 1, device=device)
            targets = Records(labels.int(), torch.ones(len(labels), device=device), places)
        elif name == "FullKD":
            with torch.no_grad():
                hidden = teacher.base_model(batch.input_ids).last_hidden_state.flatten(0, 1)
            targets = DenseTeacher(hidden, teacher.lm_head.weight)
        hidden, head, _ = run_to_head(student, batch.input_ids)
        method = "full" if name == "FullKD" else "random_sampling"
        linear_sparse_kl(hidden, head, targets, method=method).backward()
        batch.check()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    bench.wait()
    return time.perf_counter() - begin, waited


def stream(dataset):
    while True:
        yield from dataset


# --- what is printed -------------------------------------------------------------------------------------------------


def table(title, *columns):
    print(f"\n{title}")
    line("", *columns)


def line(name, *values):
    print(f"  {name:<37}" + "".join(f"{value:>14}" for value in values), flush=True)


PARTS = {
    "kernels": each_kernel, "draws": draws, "losses": losses, "records": records, "capture": capture,
    "training": training,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Kernels, draws, losses, capture and training on a GPU.")
    parser.add_argument("--only", nargs="+", choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU can do; shows only that it runs")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu --tiny shows that the benchmark runs")
    bench = Bench(args.device, TINY if args.tiny else Sizes())
    name = torch.cuda.get_device_name() if bench.on_gpu else "CPU, figures mean nothing"
    triton = peer("triton", "__version__")
    print(f"{name}; torch {torch.__version__}; Triton {triton if kernels.run_on(bench.device) else 'not used'}")
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only or PARTS:
            PARTS[part](bench, Path(folder))


if __name__ == "__main__":
    main()
