"""Counting what the kernels of a call do, in Triton's interpreter: products and bytes.

Bytes are those that the programs ask for; what of it comes out of a cache, only a GPU can tell.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from kernels.launch import Grid, launch_plainly, launching_through


@dataclass
class Work:
    """Of all launches of one kernel in a call.

    Attributes:
        flops: two for each multiplication in a product of tiles; nothing else is counted.
        moved: bytes that programs load and store.
        least: bytes of the tensors that they are given, each once: no kernel moves fewer.
    """

    launches: int = 0
    flops: int = 0
    moved: int = 0
    least: int = 0


def count(call: Callable[[], Any]) -> dict[str, Work]:
    """The work of `call()` by kernel; runs it, interpreted (TRITON_INTERPRET=1)."""
    found: dict[str, Work] = {}

    def launcher(kernel: Any, grid: Grid, args: tuple, settings: dict[str, Any]) -> None:
        work = found.setdefault(kernel.__name__, Work())
        work.launches += 1
        tensors = {x.data_ptr(): x for x in args if isinstance(x, Tensor)}
        work.least += sum(x.numel() * x.itemsize for x in tensors.values())
        with _counting(work):
            launch_plainly(kernel, grid, args, settings)

    with launching_through(launcher):
        call()
    return found


@contextmanager
def _counting(work: Work) -> Iterator[None]:
    builder: Any = interpreter_builder
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def counted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        work.moved += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(ptrs, mask, *rest)

    def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        work.moved += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(ptrs, value, mask, *rest)

    def counted_dot(a: Any, b: Any, *rest: Any) -> Any:
        work.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_dot = counted_dot
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.create_dot
