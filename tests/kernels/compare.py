"""What the tests of the operators share: comparing, differentiating, documents, memory.

B batch, T time.
"""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import native
from kernels.launch import interpreting

# Relative RMS error against a float64 reference. float64: two orders of one sum of some hundred
# terms. float32: the same at 2^-24. bfloat16: its inputs are exact in the reference too, so what
# remains is the rounding of outputs and gradients to 2^-9, and of what lies between.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1.5e-2}

needs_compiler = pytest.mark.skipif(not native.has_compiler(), reason="no C++ compiler")
CPP = pytest.param("cpp", marks=needs_compiler)

COMPARED: list[str] = []  # what was held against a reference in this process


def assert_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Finite, of one shape; relative RMS error below `tolerance`, the worst element below 20 times.

    Where `expected` vanishes, the error counts as if its RMS were 0.01: gradients that cancel.
    """
    COMPARED.append(what)
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} for {tuple(expected.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    if not got.numel():
        return
    expected = expected.to(torch.float64)
    error = got.to(torch.float64) - expected
    scale = expected.square().mean().sqrt().clamp(min=1e-2)
    rms, worst = (error.square().mean().sqrt() / scale).item(), (error.abs().max() / scale).item()
    message = f"{what}: relative RMS error {rms:.2e}, worst element {worst:.2e}, of {tolerance:.0e}"
    assert rms <= tolerance, message
    assert worst <= 20 * tolerance, message


def assert_repeats_with_any_number_of_threads(run: Callable[[], Sequence[Tensor]]) -> None:
    """To the bit, in C++, however small the work."""
    threads = torch.get_num_threads()
    once = run()
    try:
        with patch.object(native, "ONE_THREAD", 0):
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                assert all(torch.equal(a, b) for a, b in zip(run(), once, strict=True))
    finally:
        torch.set_num_threads(threads)


def values_and_gradients(
    fn: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    valid: Tensor | None = None,
) -> list[Tensor]:
    """Outputs of `fn` on `inputs` cast to `dtype`, then the gradients of every input.

    Gradients are those of a sum with fixed random weights. Of the first output (B, T, ...), only
    the positions `valid` (B, T) count.
    """
    leaves = [None if x is None else x.to(dtype).clone().requires_grad_() for x in inputs]
    outputs = list(fn(*leaves))
    if valid is not None:
        outputs[0] = outputs[0] * valid.view(*valid.shape, *[1] * (outputs[0].ndim - 2))
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for y in outputs:
        weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        loss = loss + (y.to(torch.float64) * weight).sum()
    given = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(loss, given, allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for g, x in zip(gradients, given, strict=True))
    return [y.detach() for y in outputs] + list(zeros)


def assert_forms_agree(
    fn: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    valid: Tensor | None = None,
    backend: str = "torch",
) -> None:
    """`fn(backend, *inputs)` in `dtype` against the float64 reference, values and gradients."""
    rounded = [None if x is None else x.to(dtype) for x in inputs]
    expected = values_and_gradients(lambda *a: fn("reference", *a), rounded, torch.float64, valid)
    got = values_and_gradients(lambda *a: fn(backend, *a), rounded, dtype, valid)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds, which is twice the error.
    cut = 2 if backend == "triton" and dtype == torch.bfloat16 and interpreting() else 1
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert_close(f"{dtype}, number {i} of outputs and gradients", g, e, cut * TOLERANCE[dtype])


def documents(B: int, T: int, kind: str | None) -> Tensor | None:
    """None, "packed" documents, or "padded": padding anywhere, the third row nothing else."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(T)
    segments = torch.randint(0, 4, (B, T), generator=generator).sort(1).values * 3
    if kind == "padded":
        segments[torch.rand(B, T, generator=generator) < 0.25] = -1
        if B > 2:
            segments[2] = -1
    return segments


def check_operator(op: Callable, args: Sequence) -> None:
    """torch's own checks of an operator, and that its fake form tells the truth about layouts.

    torch.compile lays out memory by the fake form; inputs of unusual strides show where it errs.
    """
    torch.library.opcheck(op, args)

    def unusual(x: Tensor) -> Tensor:
        return x.detach().transpose(0, -1).contiguous().transpose(0, -1)

    args = [unusual(x) if isinstance(x, Tensor) and x.ndim > 1 else x for x in args]
    with torch.no_grad():
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*[mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args])
    for r, f in zip(tree_leaves(real), tree_leaves(fake), strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), str(op)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.itemsize
            for x in tree_leaves(result)
            if isinstance(x, Tensor)
        ]
        self.numel = max(self.numel, *sizes, 0)
        return result


def bytes_kept_for_backward(fn: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps while `fn` runs."""
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = (x, storage.nbytes())  # holding x keeps the address taken
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fn()
    return sum(size for _, size in kept.values())
