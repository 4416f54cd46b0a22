"""Linear attention layers: the quadratic form, equal maps, Hedgehog's properties."""

import pytest
import torch
from torch import Tensor

from layers.feature_maps import TaylorFeatureMap
from layers.hedgehog import HedgehogAttention
from layers.linear_attention import FeatureMapAttention, LinearAttention

ROUNDING = 1e-11  # float64, sums of a thousand products of features


def weights(layer: FeatureMapAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, T, T) normalised causal weights, and the values (B, H, T, V), as dense matrices."""
    q, k, v = layer.project(x, torch.arange(x.shape[1]))
    groups = layer.num_heads // layer.num_kv_heads
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    phi_q, phi_k = (t.transpose(1, 2) for t in (layer.query_map(q), layer.key_map(k)))
    A = (phi_q @ phi_k.mT).tril()
    return A / (A.sum(-1, keepdim=True) + layer.eps), v.transpose(1, 2)


LAYERS = {
    "elu": lambda: LinearAttention(16, num_heads=4),
    "relu": lambda: LinearAttention(16, num_heads=4, feature_map="relu"),
    "taylor": lambda: LinearAttention(
        16, num_heads=4, feature_map="taylor", key_dim=5, value_dim=3, rotary=False
    ),
    "grouped": lambda: LinearAttention(16, num_heads=4, num_kv_heads=2),
    "hedgehog": lambda: HedgehogAttention(16, num_heads=4, init="kaiming_per_head"),
    "hedgehog grouped": lambda: HedgehogAttention(16, num_heads=4, num_kv_heads=1, tie=True),
    "hedgehog exp": lambda: HedgehogAttention(16, num_heads=2, activation="exp", map_bias=True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [1, 37, 64, 65])
@torch.no_grad()
def test_equals_the_quadratic_form(name, length):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(2, length, 16, dtype=torch.float64)
    P, v = weights(layer, x)
    expected = layer.merge((P @ v).transpose(1, 2))
    torch.testing.assert_close(layer(x)[0], expected, rtol=ROUNDING, atol=ROUNDING)


@torch.no_grad()
def test_compressed_taylor_map_changes_the_state_and_not_the_output():
    torch.manual_seed(0)
    small = LinearAttention(16, num_heads=4, feature_map="taylor", rotary=False).double()
    large = LinearAttention(
        16, num_heads=4, feature_map="taylor", rotary=False, compressed=False
    ).double()
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 70, 16, dtype=torch.float64)
    torch.testing.assert_close(large(x)[0], small(x)[0], rtol=0, atol=ROUNDING)
    assert isinstance(large.key_map, TaylorFeatureMap)
    assert (small.key_map.num_features, large.key_map.num_features) == (15, 21)
    # S, z in float64, a position and a document number
    assert small.state_bytes(3, 1000) == 3 * (8 * 4 * 15 * 5 + 16)


@torch.no_grad()
def test_hedgehog_weights_are_a_distribution_over_the_past():
    torch.manual_seed(0)
    layer, x = HedgehogAttention(16, num_heads=2), torch.randn(2, 40, 16)
    P, _ = weights(layer, x)
    assert (P >= 0).all()
    # float32 sums of at most 40 weights
    torch.testing.assert_close(P.sum(-1), torch.ones(2, 2, 40), rtol=0, atol=1e-5)
    assert (P[..., 0, 0] - 1).abs().max() < 1e-6


@torch.no_grad()
def test_only_the_scale_of_keys_matters_not_that_of_queries():
    torch.manual_seed(0)
    layer, x = HedgehogAttention(16, num_heads=2).double(), torch.randn(1, 20, 16).double()
    y, _ = layer(x)
    for changed in ("query_map", "key_map"):  # one factor for all tokens cancels on either side
        scaled = HedgehogAttention(16, num_heads=2).double()
        scaled.load_state_dict(layer.state_dict())
        getattr(scaled, changed).register_forward_hook(lambda module, args, out: out * 7)
        torch.testing.assert_close(scaled(x)[0], y, rtol=0, atol=ROUNDING)


def test_hedgehog_ties_or_parts_its_maps():
    tied, parted = (HedgehogAttention(16, num_heads=2, tie=tie) for tie in (True, False))
    assert tied.query_map is tied.key_map
    assert parted.query_map is not parted.key_map
    extra = sum(p.numel() for p in parted.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 2 * 8 * 8


def test_paper_sizes():
    # Hedgehog in GPT-2's size: 12 heads, 64 values, twice as many features, in float32.
    hedgehog = HedgehogAttention(768, num_heads=12)
    assert hedgehog.state_bytes(1, 10**6) == 12 * (128 * 64 + 128) * 4 + 16
    # Based 360M: 16 heads, 16 key features, of which the full map makes 273, 64 values.
    based = LinearAttention(1024, num_heads=16, feature_map="taylor", key_dim=16, compressed=False)
    assert based.state_bytes(1, 1) == 16 * 273 * 65 * 4 + 16
    assert sum(p.numel() for p in based.parameters()) == 2 * 1024 * 1024 + 2 * 1024 * 256


def test_state_is_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = LinearAttention(16, num_heads=4), torch.randn(2, 70, 16)
    expected, exact = layer(x, want_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, want_state=True)
    assert y.dtype is torch.bfloat16
    assert state.S.dtype is torch.float32
    # 70 features rounded to bfloat16 (2^-9) add up in float32: errors do not.
    assert (state.z - exact.z).abs().max() / exact.z.abs().max() < 2**-8
    assert (y.float() - expected).abs().max() / expected.abs().max() < 3e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearAttention(16, num_heads=4, feature_map="cos"), "feature_map='cos': allowed"),
        (lambda: LinearAttention(16, num_heads=0), "num_heads=0"),
        (lambda: LinearAttention(16, num_heads=4, eps=-1.0), "eps=-1.0"),
        (lambda: LinearAttention(16, num_heads=4, key_dim=3), "rotary=True with 3 features"),
        (lambda: HedgehogAttention(16, num_heads=4, skip=True, feature_dim=2), "skip=True"),
    ],
)
def test_options_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
