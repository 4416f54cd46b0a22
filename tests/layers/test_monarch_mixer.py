"""Monarch Mixer's sequence mixer: the map as written, causality, cost, what decays.

B batch, T time, D model width, L longest document.
"""

import pytest
import torch
from torch import nn

from layers.marks import marked_parameters
from layers.monarch_mixer import MonarchMixer
from models.language_model import LanguageModel

EXACT = 1e-12  # float64, relative to the largest value


def layer_of(**options) -> MonarchMixer:
    """float64, D = 3, L = 40."""
    torch.manual_seed(0)
    return MonarchMixer(3, max_len=40, filter_order=8, **options).double()


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


def direct(v: torch.Tensor, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The causal sum, one output at a time; v (B, T, D), h (D, T)."""
    outputs = [
        (v[:, : t + 1] * h[:, : t + 1].flip(1).T).sum(1) + bias * v[:, t] for t in range(v.shape[1])
    ]
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("transform", ["monarch", "fft"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("T", [1, 9, 23, 40])
def test_is_the_map_as_written(T, residual, transform):
    layer = layer_of(residual=residual, transform=transform)
    x = torch.randn(2, T, 3, dtype=torch.float64)
    padded = nn.functional.pad(layer.in_proj(x), (0, 0, 2, 0))
    short = layer.short_filter
    u = sum(padded[:, j : j + T] * short.weight[:, j] for j in range(3)) + short.bias
    before, after, v = u.split(3, dim=-1)
    z = after * direct(v * before, layer.filter_fn(T), layer.filter_fn.bias)
    if residual:
        z = z + direct(x, layer.filter_fn2(T), layer.filter_fn2.bias)
    assert_near(layer(x)[0], layer.out_proj(z), EXACT)


def test_both_transforms_have_the_same_gradients():
    x = torch.randn(2, 31, 3, dtype=torch.float64, requires_grad=True)
    grads = []
    for transform in ("monarch", "fft"):
        layer = layer_of(transform=transform)
        y, _ = layer(x)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    for got, expected in zip(*grads, strict=True):
        assert_near(got, expected, EXACT)


def test_no_output_sees_a_later_input():
    """float32, relative, at the spec's bound; the public bidirectional mixer leaks 0.49 here."""
    torch.manual_seed(0)
    layer, x = MonarchMixer(8, max_len=64), torch.randn(1, 64, 8, requires_grad=True)
    y, _ = layer(x)
    for t in (0, 20, 50):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert grad[:, t + 1 :].abs().max() <= 1e-6 * grad.abs().max()


def test_cost_grows_as_the_power_three_halves():
    with torch.device("meta"):
        layer = MonarchMixer(64, max_len=2**17)
        fast = MonarchMixer(64, max_len=2**17, transform="fft")

    def mixing(of, length):
        return of.flops(1, length) - length * (of.flops(1, 1) - 4 * 64)

    assert mixing(layer, 2**17) / mixing(layer, 2**15) == pytest.approx(8, rel=0.03)
    assert mixing(fast, 2**17) / mixing(fast, 2**15) < 4.7


def test_initialisation_survives_the_model():
    torch.manual_seed(0)
    layer = MonarchMixer(32)
    chosen = {name: p.detach().clone() for name, p in layer.named_parameters()}
    LanguageModel(11, 32, [layer], [None], nn.LayerNorm)
    for name, p in layer.named_parameters():
        own = name.startswith(("filter_fn", "short_filter"))
        assert torch.equal(p, chosen[name]) == own, name
    assert not torch.equal(layer.filter_fn(9), layer.filter_fn2(9))


def test_what_decays():
    decays = {name for name, _, m in marked_parameters(MonarchMixer(8)) if m.decay}
    assert decays == {"in_proj.weight", "out_proj.weight", "short_filter.weight"}


@torch.no_grad()
def test_no_document_is_longer_than_the_filters():
    with pytest.raises(ValueError, match=r"MonarchMixer: a document of 41 positions.*max_len=40"):
        layer_of()(torch.randn(2, 41, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_size": 0}, "conv_size=0: expected at least 1"),
        ({"transform": "dct"}, "transform='dct': allowed: monarch, fft"),
        ({"emb_dim": 4}, "emb_dim=4.*an odd number"),
        ({"num_inner": -1}, "num_inner=-1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MonarchMixer(8, **options)
