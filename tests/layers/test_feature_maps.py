"""Feature maps: golden arrays, the properties of the papers, extremes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layers.feature_maps import (
    EluFeatureMap,
    HedgehogFeatureMap,
    ReluFeatureMap,
    TaylorFeatureMap,
)
from layers.marks import marked_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
HEDGEHOG = np.load(GOLDEN / "hedgehog_feature_map.npz")
TAYLOR = np.load(GOLDEN / "taylor_feature_map.npz")


def golden(name: str) -> torch.Tensor:
    """(B, H, T, K) as stored -> (B, T, H, K) as our maps take it."""
    return torch.from_numpy(HEDGEHOG[name]).transpose(1, 2)


def hedgehog(weight: torch.Tensor | None = None, f: int | None = None, **options):
    module = HedgehogFeatureMap(3, 16, f, **options)
    if weight is not None:
        with torch.no_grad():
            module.weight.copy_(weight)
    return module


W, W_SKIP = torch.from_numpy(HEDGEHOG["w"]), torch.from_numpy(HEDGEHOG["w_skip"])


@pytest.mark.golden("hedgehog_feature_map", mixers=["hedgehog"])
@pytest.mark.parametrize(
    ("expected", "x", "module"),
    [
        ("softmax_full", "x", hedgehog(W, 8)),
        ("softmax_half", "x", hedgehog(W, 8, halfspace=True)),
        ("exp_full", "x", hedgehog(W, 8, activation="exp_stable")),
        ("exp_half", "x", hedgehog(W, 8, activation="exp_stable", halfspace=True)),
        ("softmax_full_identity", "x", hedgehog()),
        ("exp_full_identity", "x", hedgehog(activation="exp_stable")),
        ("softmax_full_skip", "x", hedgehog(W_SKIP, skip=True)),
        ("softmax_full_extreme", "x_extreme", hedgehog(W, 8)),
        ("exp_full_extreme", "x_extreme", hedgehog(W, 8, activation="exp_stable")),
        ("fla_joint_softmax_identity", "x", hedgehog(activation="joint", bias=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_hedgehog_golden(expected, x, module):
    # float32 arrays, tolerances as published with them.
    torch.testing.assert_close(module(golden(x)), golden(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hedgehog_takes_a_map_shared_by_all_heads():
    shared = torch.from_numpy(HEDGEHOG["fla_weight"]), torch.from_numpy(HEDGEHOG["fla_bias"])
    module = hedgehog(shared[0].T, activation="joint", bias=True)  # (out, in) -> x @ W
    module.bias.copy_(shared[1])
    expected = golden("fla_joint_softmax")
    torch.testing.assert_close(module(golden("x")), expected, rtol=1e-4, atol=1e-5)


def test_every_golden_array_is_used():
    used = {"x", "x_extreme", "w", "w_skip", "fla_weight", "fla_bias", "fla_joint_softmax"}
    used |= {"softmax_full", "softmax_half", "exp_full", "exp_half", "softmax_full_identity"}
    used |= {"exp_full_identity", "softmax_full_skip", "softmax_full_extreme", "exp_full_extreme"}
    assert set(HEDGEHOG) == used | {"fla_joint_softmax_identity"}


@pytest.mark.parametrize("activation", ["softmax", "exp_stable", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_hedgehog_is_finite_and_positive(activation, dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 9, 3, 16) * torch.logspace(-4, 4, 9)[:, None, None]).to(dtype)
    y = hedgehog(activation=activation)(x)
    assert y.dtype is torch.float32
    assert y.shape == (2, 9, 3, 32)
    assert y.isfinite().all()
    assert (y > 0).all()
    assert (y.bfloat16() > 0).all(), "1e-12 is a number in bfloat16 too"


@torch.no_grad()
def test_hedgehog_symmetries():
    torch.manual_seed(0)
    x, module = torch.randn(2, 5, 3, 16), hedgehog(W, 8)
    positive, negative = module(x).chunk(2, dim=-1)
    ones = torch.ones(2, 5, 3)
    torch.testing.assert_close(positive.sum(-1), ones)
    torch.testing.assert_close(negative.sum(-1), ones)
    torch.testing.assert_close(module(-x), torch.cat([negative, positive], dim=-1))
    shifted = hedgehog(W, 8, bias=True)
    shifted.bias.fill_(3.0)  # a constant over the features does nothing under softmax
    torch.testing.assert_close(shifted(x), module(x))


def test_hedgehog_exp_is_the_definition():
    torch.manual_seed(0)
    x, module = torch.randn(2, 5, 3, 16), hedgehog(W, 8, activation="exp")
    z = torch.einsum("bthk,hkf->bthf", x, W)
    torch.testing.assert_close(module(x).detach(), torch.cat([z.exp(), (-z).exp()], -1))


def test_hedgehog_initialisation_and_marks():
    torch.manual_seed(0)
    assert torch.equal(hedgehog().weight, torch.eye(16).expand(3, 16, 16))
    assert torch.equal(hedgehog(f=8).weight, torch.eye(16, 8).expand(3, 16, 8))
    drawn = HedgehogFeatureMap(40, 32, 16, init="kaiming_per_head").weight
    # Uniform within sqrt(6 / K): the fan-in is one head's K, whatever the number of heads.
    assert drawn.abs().max().item() == pytest.approx((6 / 32) ** 0.5, rel=1e-3)
    assert drawn.std().item() == pytest.approx((2 / 32) ** 0.5, rel=2e-2)
    assert not hedgehog(skip=True, init="zero_with_skip").weight.any()
    for _, _, marks in marked_parameters(hedgehog(bias=True)):
        assert marks.own_init
        assert not marks.decay


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation='relu': allowed: softmax, exp, exp_stable, joint"),
        ({"init": "zero"}, "init='zero': allowed: identity, kaiming_per_head, zero_with_skip"),
        ({"activation": "joint", "halfspace": True}, "halfspace=True with activation='joint'"),
        ({"skip": True, "f": 8}, "skip=True with feature_dim=8: expected head_dim=16"),
        ({"init": "zero_with_skip"}, "init='zero_with_skip' with skip=False"),
        ({"f": 0}, "feature_dim=0"),
    ],
)
def test_hedgehog_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        hedgehog(**options)


@pytest.mark.golden("taylor_feature_map", mixers=["based", "jrt"])
@pytest.mark.parametrize("f", [4, 16])
def test_taylor_golden(f):
    x, y = (torch.from_numpy(TAYLOR[f"{name}_d{f}"]) for name in "xy")
    full, compressed = TaylorFeatureMap(f), TaylorFeatureMap(f, compressed=True)
    assert full.num_features == 1 + f + f * f
    assert compressed.num_features == 1 + f + f * (f + 1) // 2
    # float64, tolerance as published with the arrays.
    phi = torch.from_numpy(TAYLOR[f"phi_d{f}"])
    torch.testing.assert_close(full(x), phi, rtol=0, atol=1e-10)
    assert (full(x)[..., 0] == 1).all()
    s = (x * y).sum(-1) / f**0.5
    kernel = torch.from_numpy(TAYLOR[f"kernel_d{f}"])
    torch.testing.assert_close(1 + s + s * s / 2, kernel, rtol=0, atol=1e-10)
    for module in (full, compressed):
        products = (module(x) * module(y)).sum(-1)
        torch.testing.assert_close(products, kernel, rtol=0, atol=1e-10)
        assert (products >= 0.5).all()


@pytest.mark.golden("taylor_feature_map", mixers=["based", "jrt"])
def test_taylor_golden_with_another_scale():
    module = TaylorFeatureMap(8, scale_dim=32)
    x, phi = (torch.from_numpy(TAYLOR[f"{name}_d8_scale32"]) for name in ("x", "phi"))
    torch.testing.assert_close(module(x), phi, rtol=0, atol=1e-10)


def test_elu_and_relu():
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 2.5]).view(1, 1, 1, 5)
    y = EluFeatureMap(5)(x).flatten()
    expected = [*torch.tensor([-80.0, -20.0, -1.0]).exp().tolist(), 1.0, 3.5]
    torch.testing.assert_close(y, torch.tensor(expected), rtol=1e-6, atol=0)
    assert (y > 0).all(), "elu(x) + 1 in float32 is zero from -17 on"
    assert ReluFeatureMap(5)(x).flatten().tolist() == [0, 0, 0, 0, 2.5]


@pytest.mark.parametrize(
    "module",
    [
        EluFeatureMap(16),
        TaylorFeatureMap(16),
        TaylorFeatureMap(16, compressed=True),
        hedgehog(bias=True),
        hedgehog(activation="joint"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_gradients_and_flops(module):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.double(), x)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert counter.get_total_flops() == module.flops(2)
    assert y.shape[-1] == module.num_features


def test_autocast_does_not_reach_into_a_map():
    torch.manual_seed(0)
    x, module = torch.randn(2, 5, 3, 16), hedgehog(W, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(x)
    assert torch.equal(inside, module(x))
