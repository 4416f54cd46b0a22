"""No output depends on a later input, except where the mixer says so."""

import torch
from torch import Tensor

from tests.contract.compare import assert_close, random_input, skip_if_leaky
from tests.contract.subjects import Factory, build


@torch.no_grad()
def check_perturbation(make: Factory, length: int = 131) -> None:
    """Changing inputs from t on changes no output before t, on both sides of chunk borders."""
    mixer = build(make)
    skip_if_leaky(mixer)
    x = random_input(2, length, mixer)
    y, _ = mixer(x)
    for t in (1, 2, 63, 64, 65, 127, 128, 130):
        changed = x.clone()
        changed[:, t:] = random_input(2, length - t, mixer, seed=t + 7)
        z, _ = mixer(changed)
        assert_close(f"output before {t} after a change from {t} on", z[:, :t], y[:, :t])
        assert not torch.equal(z[:, t:], y[:, t:]), "the output does not depend on the input"


def check_jacobian(make: Factory, length: int = 11) -> None:
    """d y_s / d x_t is zero for all t > s."""
    mixer = build(make)
    skip_if_leaky(mixer)
    x = random_input(1, length, mixer).requires_grad_()
    y, _ = mixer(x)
    reach = dependence(y, x)
    # A convolution by FFT leaves rounding there, 1e-17 of the whole; a leak is not that small.
    zero = reach.abs().max() * 1e-14
    for s in range(length):
        later = reach[s, s + 1 :]
        assert (later <= zero).all(), (
            f"output {s} depends on input {s + 1 + int(later.argmax())}: {later.max():.2e}"
        )
        assert reach[s, s] > zero, f"output {s} does not depend on its own input"


def check_prefix(make: Factory, length: int = 12) -> None:
    """prefix_len opens the prefix and nothing else; a mixer without prefixes ignores it."""
    mixer = build(make)
    skip_if_leaky(mixer)
    x = random_input(2, length, mixer).requires_grad_()
    prefix_len = torch.tensor([5, 0])
    y, _ = mixer(x, prefix_len=prefix_len)
    if mixer.causal == "strict":
        assert torch.equal(y, mixer(x)[0]), "a strictly causal mixer reads prefix_len"
        return
    for row, M in enumerate(prefix_len.tolist()):
        reach = dependence(y[row : row + 1], x)[:, :, row]
        zero = reach.abs().max() * 1e-14
        future = torch.ones_like(reach).triu(1).bool()
        future[:, :M] = False
        assert (reach[future] <= zero).all(), f"row {row} sees beyond its prefix of {M}"
        assert (reach[:M, :M] > zero).all(), f"row {row} does not see all of its prefix of {M}"


def dependence(y: Tensor, x: Tensor) -> Tensor:
    """(T, T) for one row of y: size of the gradient of a random projection of y_s to x_t.

    With several rows in x, (T, T, B).
    """
    weights = torch.randn(y.shape[2], generator=torch.Generator().manual_seed(5)).to(y.dtype)
    rows = []
    for s in range(y.shape[1]):
        (grad,) = torch.autograd.grad(y[0, s] @ weights, x, retain_graph=True)
        rows.append(grad.norm(dim=-1))
    reach = torch.stack(rows)  # (T, B, T)
    return reach[:, 0] if x.shape[0] == 1 else reach.transpose(1, 2)
