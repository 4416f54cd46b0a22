"""S4D: kernels, both forms, initialisation, what decays.

B batch, T time, D channels, N state.
"""

import math

import pytest
import torch
from torch import nn

from layers.marks import marked_parameters
from layers.s4d import S4D, S4DState, initial_spectrum
from models.language_model import LanguageModel

EXACT = 1e-12  # float64, relative to the largest value
INITS = ["lin", "inv", "quad", "real", "legs"]


def layer_of(d_model: int = 3, **options) -> S4D:
    """float64, N = 8."""
    torch.manual_seed(0)
    return S4D(d_model, d_state=8, **options).double()


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


@pytest.mark.parametrize("init", INITS)
def test_kernel_is_the_unrolled_recurrence(init):
    layer = layer_of(init=init)
    step = layer.log_dt.exp()[:, None]
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    a, b, c = (step * A).exp(), ((step * A).exp() - 1) / A, torch.view_as_complex(layer.C)
    for length in (1, 2, 9, 10, 37):
        expected = [2 * (c * b * a**t).sum(-1).real for t in range(length)]
        # exp(z) - 1 as it is written here loses four digits to cancellation at these steps.
        assert_near(layer.kernel(length), torch.stack(expected, 1), 1e-11)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65])
def test_convolution_equals_recurrence_with_gradients(T, start):
    x = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 3, 4, dtype=torch.complex128, requires_grad=True)
    state = S4DState(h, torch.zeros(2, dtype=torch.int64)) if start else None
    results = []
    for backend in ("auto", "reference"):
        layer = layer_of(backend=backend, output="none")
        y, end = layer(x, state, want_state=True)
        wanted = [x, *layer.parameters(), *([h] if start else [])]
        loss = y.cumsum(1).sum() + torch.view_as_real(end.h).cumsum(-1).sum()
        results.append([y, end.h, *torch.autograd.grad(loss, wanted)])
    for got, expected in zip(*results, strict=True):
        assert_near(got, expected, 1e-11)  # gradients of the steps' logarithms are long sums


def test_gradcheck_of_the_kernel():
    layer = layer_of(2)
    names = ["log_dt", "log_A_real", "A_imag", "C"]

    def kernel(*parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            Kernel(layer), {f"layer.{n}": p for n, p in named.items()}
        )

    leaves = [getattr(layer, name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(kernel, leaves)


class Kernel(nn.Module):
    """The kernel of 5 positions as a forward pass."""

    def __init__(self, layer: S4D) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> torch.Tensor:
        return self.layer.kernel(5)


def test_small_steps_approach_the_continuous_kernel():
    """K_t / step -> 2 Re(sum C exp(A t step)), with an error of the first order in the step."""
    layer = layer_of()
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    c = torch.view_as_complex(layer.C)
    errors = []
    for step in (1e-3, 5e-4):
        with torch.no_grad():
            layer.log_dt.fill_(math.log(step))
        time = torch.arange(64, dtype=torch.float64) * step
        exact = 2 * (c[..., None] * (A[..., None] * time).exp()).sum(1).real
        errors.append((layer.kernel(64) / step - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_half_the_step_at_twice_the_rate_is_the_same_system():
    """The step response, which zero-order hold keeps, at every other sample."""
    layer = layer_of()
    slow = layer.kernel(20).cumsum(1)
    with torch.no_grad():
        layer.log_dt.sub_(math.log(2))
    fast = layer.kernel(40).cumsum(1)
    assert_near(fast[:, 1::2], slow, EXACT)


def test_states_decay_whatever_the_parameters():
    layer = layer_of()
    with torch.no_grad():
        for p in (layer.log_A_real, layer.A_imag, layer.log_dt):
            p.normal_(std=3)
    assert (layer.system().log_a.exp().abs() < 1).all()


def test_initial_spectra():
    n = torch.arange(32, dtype=torch.float64)
    expected = {
        "lin": (0.5 + 0 * n, math.pi * n),
        "inv": (0.5 + 0 * n, 64 / math.pi * (64 / (2 * n + 1) - 1)),
        "quad": (0.5 + 0 * n, (1 + 2 * n) ** 2 / math.pi),
        "real": (n + 1, 0 * n),
    }
    for init, (decay, frequency) in expected.items():
        got = initial_spectrum(init, 64)
        assert torch.allclose(got[0], decay, rtol=1e-12)
        assert torch.allclose(got[1], frequency, rtol=1e-12)
    # LegS: eigenvalues of HiPPO's matrix with its rank-1 term, by another solver.
    i = torch.arange(64, dtype=torch.float64)
    root = (2 * i + 1).sqrt()
    A = -(root[:, None] * root).tril(-1) - torch.diag(i + 1)
    normal = torch.linalg.eigvals(A + root[:, None] * root / 2)
    decay, frequency = initial_spectrum("legs", 64)
    assert torch.allclose(normal.real, torch.full_like(normal.real, -0.5), atol=1e-9)
    assert torch.equal(decay, torch.full_like(decay, 0.5))
    assert torch.allclose(normal.imag[normal.imag > 0].sort().values, frequency, rtol=1e-9)


def test_initialisation_survives_the_model():
    torch.manual_seed(0)
    layer = S4D(512)
    chosen = {name: p.detach().clone() for name, p in layer.named_parameters()}
    LanguageModel(11, 512, [layer], [None], nn.LayerNorm)
    for name in ("log_dt", "log_A_real", "A_imag", "C", "D"):
        assert torch.equal(getattr(layer, name), chosen[name]), name
    assert (layer.log_A_real.exp() - 0.5).abs().max() < 1e-6
    steps = layer.log_dt.exp()
    assert 1e-3 * 0.999 < steps.min() < 1.1e-3
    assert 0.09 < steps.max() < 0.1 * 1.001
    # Uniform in the logarithm: mean at the middle, within 4 standard errors of 512 draws.
    middle, width = (math.log(1e-3) + math.log(0.1)) / 2, math.log(100)
    assert layer.log_dt.mean().item() == pytest.approx(middle, abs=4 * width / (12 * 512) ** 0.5)
    assert layer.C.var().item() == pytest.approx(0.5, rel=0.03)
    assert layer.D.var().item() == pytest.approx(1, rel=0.3)


def test_what_decays_and_whose_learning_rate_is_bounded():
    decays = {name: m.decay for name, _, m in marked_parameters(S4D(4))}
    assert {name for name, decay in decays.items() if decay} == {"C", "out_proj.weight"}
    rates = {name: m.max_lr for name, _, m in marked_parameters(S4D(4)) if m.max_lr}
    assert rates == {"log_dt": 1e-3, "log_A_real": 1e-3, "A_imag": 1e-3}
    assert not any(m.max_lr for _, _, m in marked_parameters(S4D(4, max_lr=None)))


def test_the_kernel_is_of_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = S4D(16, output="none"), torch.randn(2, 40, 16)
    expected, end = layer(x, want_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, want_state=True)
        assert torch.equal(layer.kernel(40), layer.kernel(40).float())
    assert state.h.dtype is torch.complex64
    assert torch.equal(y, expected)
    assert torch.equal(state.h, end.h)


def test_sizes_are_the_papers():
    """Per channel: N/2 decays and frequencies, N numbers of C, a step and a skip."""
    layer = S4D(16, d_state=64, output="none")
    assert sum(p.numel() for p in layer.parameters()) == 16 * (64 + 64 + 2)
    assert layer.state_bytes(2, 5) == 2 * (8 * 16 * 32 + 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 7}, "d_state=7: expected at least 1, and an even number"),
        ({"dt_min": 0.2}, "dt_min=0.2, dt_max=0.1: expected 0 < dt_min <= dt_max"),
        ({"init": "legt"}, "init='legt': allowed: lin, inv, quad, real, legs"),
        ({"output": "gelu"}, "output='gelu': allowed: glu, none"),
        ({"backend": "cuda"}, "backend='cuda': allowed: auto, triton, torch, reference"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        S4D(8, **options)
