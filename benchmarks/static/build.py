"""Compiling a recorded launch for a GPU that is not there, and reading the machine code."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.static.record import ALIGNED, Launch

TOOLS = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Architecture:
    """A GPU to compile for, and the shared memory that one program may use there, in bytes."""

    target: GPUTarget
    shared_limit: int


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 << 10),
}


@dataclass(frozen=True)
class Figures:
    """What the machine code of a kernel says.

    Attributes:
        registers: of a thread; vector and accumulator registers on AMD.
        spills: instructions (NVIDIA) or registers (AMD) that go to memory for want of registers.
        shared: bytes of shared memory of a program.
        tensor_cores: matrix instructions in the code.
    """

    registers: int
    spills: int
    shared: int
    tensor_cores: int


def build(launch: Launch, architecture: Architecture) -> Figures:
    """Compile, at the launch's own settings, and read."""
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={(i,): ALIGNED for i in launch.aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=architecture.target, options=options)
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        return _nvidia(compiled.asm["cubin"], shared)
    return _amd(compiled.asm["amdgcn"], shared)


def problems(name: str, launch: Launch, architecture: str, figures: Figures) -> list[str]:
    """What must not be: spills, too much shared memory, products beside the tensor cores."""
    limit = ARCHITECTURES[architecture].shared_limit
    found = []
    if figures.spills:
        found.append(f"{figures.spills} spills")
    if figures.shared > limit:
        found.append(f"{figures.shared} bytes of shared memory of {limit}")
    if launch.multiplies and not figures.tensor_cores:
        found.append("no tensor-core instruction for its products")
    return [f"{name}, {launch.name} on {architecture}: {what}" for what in found]


def _nvidia(cubin: bytes, shared: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", path)
        code = _output(TOOLS / "nvdisasm", path)
    return Figures(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=shared,
        tensor_cores=len(re.findall(r"\b[HIQD]G?MMA\b", code)),
    )


def _amd(code: str, shared: int) -> Figures:
    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1])

    return Figures(
        registers=value("vgpr_count"),
        spills=value("vgpr_spill_count"),
        shared=shared,
        tensor_cores=len(re.findall(r"\bv_s?mfma", code)),
    )


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
