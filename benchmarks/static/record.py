"""Recording the launches of a call: which kernel, with which types of arguments and settings."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.launch import Grid, launching_through

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton specialises it for its arguments.

    Attributes:
        signature: the type of every argument, "constexpr" for what is known when compiling.
        constants: the values of those, by position.
        aligned: positions of the arguments that are multiples of 16.
        tensor_bytes: of all tensors that the kernel is given, each counted once.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    aligned: tuple[int, ...]
    warps: int
    stages: int
    tensor_bytes: int

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.__name__

    @property
    def label(self) -> str:
        """The name, and the switches that are on."""
        names = self.kernel.arg_names
        on = [names[i].lower() for (i,), value in self.constants.items() if value is True]
        return f"{self.name} ({', '.join(on)})" if on else self.name

    @property
    def multiplies(self) -> bool:
        """Whether it has products that belong on tensor cores: of 16-bit factors."""
        names = self.kernel.arg_names
        factors = self.constants[(names.index("DOT"),)] if "DOT" in names else None
        return factors is not None and factors.primitive_bitwidth == 16


def describe(kernel: Any, args: tuple, settings: dict[str, Any]) -> Launch:
    """The specialisation that Triton would choose for these arguments."""
    settings = dict(settings)
    warps, stages = settings.pop("num_warps"), settings.pop("num_stages")
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | settings
    signature, constants, aligned = {}, {}, []
    for i, name in enumerate(names):
        value = given[name]
        if kernel.params[i].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned.append(i)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                aligned.append(i)
        else:
            signature[name] = "fp32"
    tensors = {x.data_ptr(): x for x in args if isinstance(x, Tensor)}
    size = sum(x.numel() * x.itemsize for x in tensors.values())
    return Launch(kernel, signature, constants, tuple(aligned), warps, stages, size)


class Recorder:
    """Stands in for the launcher: notes launches, and runs nothing.

    Whole numbers are left as zeros, since an operator may use what a kernel wrote as places.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any, grid: Grid, args: tuple, settings: dict[str, Any]) -> None:
        self.launches.append(describe(kernel, args, settings))
        for value in args:
            if isinstance(value, Tensor) and not value.is_floating_point():
                value.zero_()


def record(call: Any) -> list[Launch]:
    """The launches of `call()`, none of which happens."""
    recorder = Recorder()
    with launching_through(recorder):
        call()
    return recorder.launches
