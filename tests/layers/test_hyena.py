"""Hyena: the operator as written, its filters, lengths, what decays.

B batch, T time, D model width, O order, L longest document, E embedding width.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layers.hyena import Hyena
from layers.long_conv import ImplicitFilter
from layers.marks import marked_parameters
from models.language_model import LanguageModel

EXACT = 1e-12  # float64, relative to the largest value


def layer_of(**options) -> Hyena:
    """float64, D = 3, L = 40."""
    torch.manual_seed(0)
    return Hyena(3, max_len=40, emb_dim=5, filter_order=8, **options).double()


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


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 7, 23, 40])
def test_is_the_operator_as_written(order, T):
    layer = layer_of(order=order)
    x = torch.randn(2, T, 3, dtype=torch.float64)
    u = layer.in_proj(x)
    padded = nn.functional.pad(u, (0, 0, 2, 0))
    short = layer.short_filter
    u = sum(padded[:, j : j + T] * short.weight[:, j] for j in range(3)) + short.bias
    *gates, v = u.split(3, dim=-1)
    h = layer.filter_fn(T).unflatten(0, (order - 1, 3))
    bias = layer.filter_fn.bias.view(order - 1, 3)
    for i, gate in enumerate(reversed(gates[1:])):
        v = direct(v * gate, h[i], bias[i])
    assert_near(layer(x)[0], layer.out_proj(v * gates[0]), EXACT)


def test_filters_are_as_written():
    """Positions, sines and windows, element by element."""
    torch.manual_seed(0)
    L, E, width, channels = 11, 5, 4, 6
    made = ImplicitFilter(channels, L, emb_dim=E, width=width, depth=1, frequency=3.0).double()
    frequencies = [1e-4, 1.0]  # up to bands - 1
    for t in range(L):
        phases = [2 * math.pi * t / L * f for f in frequencies]
        z = [t / (L - 1), *map(math.cos, phases), *(-math.sin(p) for p in phases)]
        assert torch.allclose(made.z[t], torch.tensor(z, dtype=torch.float64), atol=1e-7)
        x = made.z[t]
        for layer in made.layers[:-1]:
            x = torch.sin(3.0 * layer(x))
        for c, value in enumerate(made.layers[-1](x)):
            rate = math.log(100) * (1 / 1.5 + c / (channels - 1) * (1 / 0.3 - 1 / 1.5))
            expected = value * math.exp(-rate * t / (L - 1))
            assert made(L)[c, t].item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_shorter_filter_is_the_beginning_of_the_longer():
    made = layer_of().filter_fn
    assert torch.equal(made(17), made(40)[:, :17])


@torch.no_grad()
def test_no_document_is_longer_than_the_filters():
    layer, x = layer_of(), torch.randn(2, 41, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a document of 41 positions.*max_len=40"):
        layer(x)
    y, state = layer(x[:, :40], want_state=True)
    with pytest.raises(ValueError, match="a document of 41 positions"):
        layer(x[:, 40:], state)
    segments = torch.arange(41).ge(20).long().expand(2, -1)
    assert_near(layer(x, segments=segments)[0][:, :20], y[:, :20], EXACT)
    assert layer(x[:, 40:], state, segments=segments[:, 40:])[0].isfinite().all()


@torch.no_grad()
def test_longer_documents_forget_where_that_is_asked_for():
    """With every tap beyond the 40th zero; token by token, in pieces, and in one call."""
    layer, x = layer_of(beyond="forget"), torch.randn(2, 70, 3, dtype=torch.float64)
    y, _ = layer(x)
    changed = x.clone()
    changed[:, 0] += 1
    # The short convolution hands input 0 on to position 2; the last tap reaches 39 further.
    reached = (layer(changed)[0] - y).abs().amax((0, 2))
    assert reached[41] > 1e-9
    assert reached[42:].max() < 1e-12
    state, outputs = None, []
    for piece in x.split([30, 1, 1, 20, 18], dim=1):
        z, state = layer(piece, state, want_state=True)
        outputs.append(z)
    assert_near(torch.cat(outputs, 1), y, EXACT)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == layer.flops(2, 70)


@torch.no_grad()
def test_decoding_keeps_filters_and_follows_new_weights():
    """Steps draw filters now and then; a state made by copying, or a fresh one, draws its own."""
    layer, x = layer_of(), torch.randn(2, 40, 3, dtype=torch.float64)
    whole, _ = layer(x)
    state, outputs = layer.new_state(2, 40), []
    lengths: list[int] = []
    hook = layer.filter_fn.register_forward_hook(lambda _, given, __: lengths.append(given[0]))
    for t in range(40):
        y, state = layer(x[:, t : t + 1], state, want_state=True)
        outputs.append(y)
    hook.remove()
    assert_near(torch.cat(outputs, 1), whole, EXACT)
    assert lengths == [2, 6, 14, 30, 40], "filters are not kept, or not drawn in time"
    other = copy.deepcopy(layer)
    other.filter_fn.freq.mul_(2)
    y, state = other(x[:, :20], want_state=True)
    y, _ = other(x[:, 20:21], state)
    assert_near(y, other(x[:, :21])[0][:, 20:], EXACT)


def test_training_steps_draw_their_own_filters():
    """What steps without gradients kept carries none: a later call with gradients draws anew."""
    layer, x = layer_of(), torch.randn(2, 12, 3, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x[:, :9], want_state=True)
    y, _ = layer(x[:, 9:], state)
    (grad,) = torch.autograd.grad(y.sum(), layer.filter_fn.freq)
    assert grad.abs().max() > 0


def test_no_output_sees_a_later_input():
    """float32, at the spec's bound: transforms leave rounding, not zeros."""
    torch.manual_seed(0)
    layer, x = Hyena(8, max_len=64), torch.randn(1, 64, 8, requires_grad=True)
    y, _ = layer(x)
    for t in (0, 20, 50):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert grad[:, t + 1 :].abs().max() <= 1e-5 * grad.abs().max()


def test_initialisation_survives_the_model():
    torch.manual_seed(0)
    layer = Hyena(32)
    chosen = {name: p.detach().clone() for name, p in layer.named_parameters()}
    LanguageModel(11, 32, [layer], [None], nn.LayerNorm)
    for name, p in layer.named_parameters():
        own = name.startswith(("filter_fn", "short_filter"))
        assert torch.equal(p, chosen[name]) == own, name
    assert (layer.filter_fn.freq == 14).all()


def test_what_decays():
    layer = Hyena(8, order=3)
    decays = {name for name, _, m in marked_parameters(layer) if m.decay}
    assert decays == {"in_proj.weight", "out_proj.weight", "short_filter.weight"}


def test_filters_are_of_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = Hyena(16, max_len=64), torch.randn(2, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
        assert layer.filter_fn(40).dtype is torch.float32
    assert y.dtype is torch.bfloat16
    assert_near(y.float(), layer(x)[0], 3e-2)  # projections of 8 bits, and a product of three


def test_sizes():
    layer = Hyena(16, max_len=100, order=3, emb_dim=5, filter_order=8, num_inner=2)
    projections = 4 * 16 * 17 + 16 * 17 + 64 * 4
    filters = 100 * 5 + (5 * 8 + 8) + 2 * (8 * 8 + 8) + 8 * 32 + 8 + 32
    assert sum(p.numel() for p in layer.parameters()) == projections + filters
    assert layer.state_bytes(2, 50) == 2 * (50 * 32 * 4 + 2 * 64 * 4 + 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order=1.*expected at least 1, 2 and 1"),
        ({"conv_size": 0}, "conv_size=0"),
        ({"emb_dim": 4}, "emb_dim=4.*an odd number"),
        ({"max_len": 1}, "max_len=1"),
        ({"filter_order": 0}, "filter_order=0"),
        ({"beyond": "cut"}, "beyond='cut': allowed: refuse, forget"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Hyena(8, **options)
