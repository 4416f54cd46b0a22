"""The linear recurrent unit: its recurrence, initialisation, what decays.

B batch, T time, D model width, N state.
"""

import math

import pytest
import torch
from torch import nn

from layers.lru import LRU
from layers.marks import marked_parameters
from models.language_model import LanguageModel


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


@pytest.mark.parametrize("T", [1, 15, 16, 40])
def test_is_the_papers_recurrence(T):
    """Equations 5 to 7 in complex numbers, one step at a time."""
    torch.manual_seed(0)
    layer = LRU(3, d_state=5, output="none").double()
    x = torch.randn(2, T, 3, dtype=torch.float64)
    rate = torch.exp(torch.complex(-layer.nu_log.exp(), layer.theta_log.exp()))
    B = torch.complex(layer.B_re, layer.B_im) * layer.gamma_log.exp()[:, None]
    C = torch.complex(layer.C_re, layer.C_im)
    h, outputs = torch.zeros(2, 5, dtype=torch.complex128), []
    for x_t in x.unbind(1):
        h = rate * h + x_t.to(h.dtype) @ B.mT
        outputs.append((h @ C.mT).real + layer.D * x_t)
    y, end = layer(x, want_state=True)
    assert_near(y, torch.stack(outputs, 1), 1e-12)  # float64
    assert_near(end.h, h, 1e-12)


def test_rates_lie_in_their_ring():
    torch.manual_seed(0)
    for low, high, phase in ((0.0, 1.0, 2 * math.pi), (0.9, 0.999, math.pi / 10)):
        layer = LRU(4, d_state=4096, r_min=low, r_max=high, max_phase=phase)
        rate = layer._rates()
        # float32, through two exponentials.
        assert low - 1e-4 <= rate.abs().min()
        assert rate.abs().max() < 1
        assert rate.abs().max() <= high + 1e-4
        angle = layer.theta_log.exp()
        assert angle.min() > 0
        assert angle.max() <= phase * (1 + 1e-5)
        # Uniform in area and in angle, within 4 standard errors of 4096 draws.
        error = 4 / (12 * 4096) ** 0.5
        area = (rate.abs().square().mean().item() - low**2) / (high**2 - low**2)
        assert area == pytest.approx(0.5, abs=error)
        assert angle.mean().item() / phase == pytest.approx(0.5, abs=error)
        gamma = (1 - rate.abs().double().square()).sqrt()
        assert torch.allclose(layer.gamma_log.exp().double(), gamma, rtol=1e-2, atol=1e-4)


def test_rates_stay_inside_the_unit_circle():
    layer = LRU(4, d_state=64).double()
    with torch.no_grad():
        layer.nu_log.normal_(std=5)
    assert (layer._rates().abs() < 1).all()


@torch.no_grad()
def test_gamma_keeps_states_of_one_size():
    """White noise of unit variance through slow rates: E |h|^2 near that of B x."""
    torch.manual_seed(0)
    layer = LRU(64, d_state=256, r_min=0.9, r_max=0.999, output="none")
    x = torch.randn(4, 4096, 64)
    _, end = layer(x, want_state=True)
    # B has variance 1 / (2 D) in each part: E |B x|^2 = 1.
    assert end.h.abs().square().mean().item() == pytest.approx(1, rel=0.15)


def test_initialisation_survives_the_model():
    torch.manual_seed(0)
    layer = LRU(256)
    chosen = {name: p.detach().clone() for name, p in layer.named_parameters()}
    LanguageModel(11, 256, [layer], [None], nn.LayerNorm)
    for name, p in layer.named_parameters():
        assert torch.equal(p, chosen[name]) != name.startswith("out_proj"), name
    for p, std in ((layer.B_re, 512**-0.5), (layer.B_im, 512**-0.5), (layer.C_re, 1 / 16)):
        assert p.std().item() == pytest.approx(std, rel=0.02)
    assert layer.C_im.std().item() == pytest.approx(1 / 16, rel=0.02)


def test_what_decays():
    kept = {name for name, _, m in marked_parameters(LRU(4)) if not m.decay}
    assert kept == {"nu_log", "theta_log", "gamma_log", "D", "out_proj.bias"}


def test_states_are_of_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = LRU(16), torch.randn(2, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer(x, want_state=True)
    assert state.h.dtype is torch.complex64
    assert_near(state.h, layer(x, want_state=True)[1].h, 2e-2)  # B x in bfloat16


def test_sizes():
    layer = LRU(16, d_state=24, output="none")
    assert sum(p.numel() for p in layer.parameters()) == 3 * 24 + 4 * 16 * 24 + 16
    assert layer.state_bytes(2, 5) == 2 * (8 * 24 + 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state=0: each must be at least 1"),
        ({"r_min": 0.9, "r_max": 0.5}, "expected 0 <= r_min < r_max <= 1"),
        ({"r_max": 1.5}, "r_max=1.5"),
        ({"max_phase": 0.0}, "max_phase > 0"),
        ({"output": "gelu"}, "output='gelu': allowed: glu, none"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LRU(8, **options)
