"""Gated short convolution: the formula, initialisation, sizes."""

import pytest
import torch
from torch.nn.functional import silu

from layers.conv import GatedConv, ShortConv
from layers.marks import marked_parameters


@pytest.mark.parametrize("options", [{}, {"conv_size": 1}, {"conv_size": 4, "conv_bias": True}])
@torch.no_grad()
def test_equals_the_formula(options):
    torch.manual_seed(0)
    layer = GatedConv(6, **options).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    u, gate = (x @ layer.in_proj.weight.T + layer.in_proj.bias).split(12, dim=-1)
    W = layer.conv.weight.shape[1]
    expected = []
    for t in range(9):
        total = torch.zeros(2, 12, dtype=torch.float64)
        if layer.conv.bias is not None:
            total = total + layer.conv.bias
        for j in range(min(W, t + 1)):
            total = total + layer.conv.weight[:, W - 1 - j] * u[:, t - j]
        expected.append(layer.out_proj(silu(total) * gate[:, t]))
    torch.testing.assert_close(layer(x)[0], torch.stack(expected, 1), rtol=0, atol=1e-12)


def test_parameters_of_the_paper():
    layer = GatedConv(64)
    matrices = sum(p.numel() for p in layer.parameters() if p.shape[-1] >= 64)
    assert layer.in_proj.weight.shape == (4 * 64, 64)
    assert matrices == 6 * 64 * 64 + 4 * 64 + 64
    assert layer.state_bytes(2, 10**6) == 2 * (2 * 128 * 4 + 8)


def test_short_convolution_draws_its_own_weights():
    torch.manual_seed(0)
    conv = ShortConv(4000, 4, bias=True)
    # Uniform within 1/2: standard deviation 1 / sqrt(12), known from 16,000 draws to 1%.
    assert conv.weight.abs().max() <= 0.5
    assert conv.weight.std().item() == pytest.approx(12**-0.5, rel=2e-2)
    marks = {name: m for name, _, m in marked_parameters(conv)}
    assert marks["weight"].own_init
    assert marks["weight"].decay
    assert not marks["bias"].decay


@pytest.mark.parametrize("options", [{"conv_size": 0}, {"expand": 0}])
def test_options_that_do_not_fit(options):
    with pytest.raises(ValueError, match="=0"):
        GatedConv(8, **options)
