"""
Compile every declared kernel, in every variant, for a card that need not be there; a program, since nothing of it may
be interpreted.

    python tests/compiled_kernels.py [--assemble] [CAPABILITY]

Prints a line of JSON for each call: kernel, variant and type, and with --assemble of each of its programs the shared
memory, and the registers that had no room; without it last how many programs there are for draws by unlike seeds.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from unittest import mock

import torch
import triton
from declared import KERNELS
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver, jit

from sklformat.distill.kernels.draw_rows import draw_rows


class NoCard:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


class ReadError(Exception):
    """A kernel is a program in Triton's language; no machine's is made of it."""


SEEDS = [(0, 0), (1, 1), (16, 32), (2**40, 2**33), (2**63 + 5, 2**64 - 1)]
"""Of draws, with sequences: numbers that Triton would make programs of their own for."""


def compile_for(capability, *, assemble):
    """(kernel, variant, type, and what ``assembled`` says) of each; CompilationError names the line that is wrong."""
    driver.set_active(NoCard(capability))
    run, make_ir, programs, read_so_far = jit.JITFunction.run, compiler.ASTSource.make_ir, [], []

    def warm(function, *args, grid, warmup, **settings):
        # With no data there is nothing to wait for; the wrapper goes on as if the kernel had run.
        with contextlib.suppress(ReadError):
            program = run(function, *args, grid=grid, warmup=True, **settings)
            programs.append(program.result() if hasattr(program, "result") else program)

    def read(source, *args):
        make_ir(source, *args)
        read_so_far.append((source.name, *source.signature.values(), str(source.attrs)))
        raise ReadError

    patches = [mock.patch.object(jit.JITFunction, "run", warm)]
    patches += [mock.patch.object(torch.cuda, "device_of", return_value=contextlib.nullcontext())]
    patches += [] if assemble else [mock.patch.object(compiler.ASTSource, "make_ir", read)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for name, kernel in KERNELS.items():
            first, few = next(iter(kernel.variants)), {axis: min(size, 2) for axis, size in kernel.full.items()}
            few |= {axis: kernel.full[axis] for axis in ("V", "K") if axis in few}
            for variant, settings in kernel.variants.items():
                for dtype in kernel.dtypes if variant == first else kernel.dtypes[:1]:
                    programs.clear()
                    kernel.run(**kernel.given(few, dtype, "cpu", settings), **settings)
                    yield name, variant, str(dtype), [assembled(program) for program in programs]
        if not assemble:
            read_so_far.clear()
            for seed, sequence in SEEDS:
                draw_rows(torch.empty(2, 300), torch.arange(2), rounds=5, seed=seed, sequence=sequence)
            assert len(read_so_far) == 2 * len(SEEDS)
            yield "draw_rows", "seeds", "", len(set(read_so_far))


def assembled(program):
    """Bytes of shared memory, and of a thread's registers that lie in memory (cuobjdump's STACK)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(tool, capture_output=True, check=True, text=True).stdout
    return program.metadata.shared, int(re.search(r"STACK:(\d+)", told)[1])


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--assemble"]
    for line in compile_for(int(words[0]) if words else 90, assemble="--assemble" in sys.argv):
        print(json.dumps(line), flush=True)
