"""Comparing outputs, states and gradients, and the runs that the checks compare.

B batch, T time, D model width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from layers.mixer import Mixer
from layers.state import map_state, tensors

# Relative to the largest value compared. In float64, two orders of one sum of up to a thousand
# terms differ by 1e-13 at most; mistakes are larger than 1e-4.
EXACT = 1e-10


def skip_if_leaky(mixer: Mixer) -> None:
    """A mixer may see the future, and depend on where a call ends, if it says so."""
    if mixer.causal == "leaky":
        pytest.skip(f"{type(mixer).__name__} declares that it leaks: {mixer.leak_reason}")


def skip_without_segments(mixer: Mixer) -> None:
    """A mixer may refuse documents if it says so."""
    if not mixer.supports_segments:
        pytest.skip(f"{type(mixer).__name__} declares that it takes no segments")


def random_input(batch: int, length: int, mixer: Mixer, seed: int = 1) -> Tensor:
    """(B, T, D) standard normal, in the dtype of the mixer's parameters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, mixer.d_model, generator=generator, dtype=torch.float64)
    return x.to(next(mixer.parameters()).dtype)


def assert_close(what: str, got: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    """Both finite, of one shape, and no element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} for {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} for {expected.dtype}"
    if not got.is_floating_point() and not got.is_complex():
        assert torch.equal(got, expected), f"{what}: {got.tolist()} for {expected.tolist()}"
        return
    assert got.isfinite().all(), f"{what}: not finite"
    if got.numel():
        error = (got - expected).abs().max().item()
        bound = tolerance * max(expected.abs().max().item(), 1e-3)
        assert error <= bound, f"{what}: off by {error:.2e}, allowed {bound:.2e}"


def assert_states_close(what: str, got: Any, expected: Any, tolerance: float = EXACT) -> None:
    """The same tensors in the same order."""
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    for i, (a, b) in enumerate(pairs):
        assert_close(f"{what}, tensor {i} of the state", a, b, tolerance)


def assert_same_up_to_room(what: str, got: Any, expected: Any, tolerance: float = EXACT) -> None:
    """As assert_states_close, but a state that grows may hold empty slots in a longer batch.

    These are zeros at either end of a dimension that is longer in `got`.
    """
    for i, (a, b) in enumerate(zip(tensors(got), tensors(expected), strict=True)):
        for dim, wanted in enumerate(b.shape):
            a = _without_room(a, dim, wanted)
        assert_close(f"{what}, tensor {i} of the state", a, b, tolerance)


def _without_room(x: Tensor, dim: int, size: int) -> Tensor:
    room = x.shape[dim] - size
    if room > 0 and not x.narrow(dim, size, room).any():
        return x.narrow(dim, 0, size)
    if room > 0 and not x.narrow(dim, 0, room).any():
        return x.narrow(dim, room, size)
    return x


def assert_equal(what: str, got: Any, expected: Any) -> None:
    """Bit-equal tensors or states."""
    for i, (a, b) in enumerate(zip(tensors(got), tensors(expected), strict=True)):
        assert a.shape == b.shape, f"{what}, tensor {i}: {tuple(a.shape)} for {tuple(b.shape)}"
        assert torch.equal(a, b), f"{what}, tensor {i}: off by {(a - b).abs().max():.2e}"


def in_pieces(
    mixer: Mixer,
    x: Tensor,
    cuts: Sequence[int],
    state: Any = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Run `x` in pieces that end before the positions `cuts`, each from the state of the last."""
    bounds = [0, *cuts, x.shape[1]]
    outputs = []
    for start, end in pairwise(bounds):
        piece = None if segments is None else segments[:, start:end]
        y, state = mixer(x[:, start:end], state, segments=piece, want_state=True)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def copy_state(state: Any) -> Any:
    """A copy that shares no memory."""
    return map_state(lambda t: t.detach().clone(), state)


def leaf_state(state: Any) -> Any:
    """A copy whose floating-point tensors are leaves that take gradients."""
    return map_state(
        lambda t: t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()), state
    )


def gradients(mixer: Mixer, x: Tensor, y: Tensor, after: Any, before: Any) -> dict[str, Tensor]:
    """Of one random scalar of the output and the final state, by name; zeros where unused."""
    generator = torch.Generator().manual_seed(2)
    loss = y.new_zeros(())
    for t in [y, *tensors(after)]:
        if t.requires_grad:
            parts = torch.view_as_real(t) if t.is_complex() else t
            weights = torch.randn(parts.shape, generator=generator, dtype=torch.float64)
            loss = loss + (parts * weights.to(parts.dtype)).sum()
    wanted = {"x": x} | dict(mixer.named_parameters())
    wanted |= {f"initial state {i}": t for i, t in enumerate(tensors(before)) if t.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(wanted.items(), found, strict=True)
    }


def assert_gradients_close(
    what: str, got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT
) -> None:
    """The same gradients under the same names."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(f"{what}, gradient of {name}", got[name], value, tolerance)
