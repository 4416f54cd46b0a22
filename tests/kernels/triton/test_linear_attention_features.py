"""Linear attention's Triton kernels that make the features of their own tiles, and mutants of them.

B batch, T time, H heads, X width of queries and keys, K features, V value width.
"""

import pytest
import torch

from kernels.linear_attention import CHUNK, linear_attention, num_features
from tests.kernels.compare import (
    TOLERANCE,
    assert_close,
    assert_forms_agree,
    check_operator,
    documents,
)
from tests.kernels.guard import mutate
from tests.kernels.test_linear_attention import flat

MODULE = "kernels.linear_attention.triton"
MAPS = ["taylor", "taylor_compressed", "hedgehog"]


def inputs(T, feature_map, *, B=2, H=2, X=12, V=20, with_state=True):
    """q, k, v, and the state behind another T tokens."""
    torch.manual_seed(T)
    q, k = torch.randn(2, 2, B, T, H, X, dtype=torch.float64)
    v = torch.randn(2, B, T, H, V, dtype=torch.float64)
    given = [q[0], k[0], v[0]]
    if with_state:
        options = {"feature_map": feature_map, "return_state": True, "backend": "reference"}
        given += linear_attention(q[1], k[1], v[1], **options)[1]
    return given


def check(T, feature_map, kind, dtype, *, normalize=True, scale=0.5, **sizes):
    """Outputs, the last state and every gradient."""
    given = inputs(T, feature_map, **sizes)
    segments = documents(given[0].shape[0], T, kind)
    options = {"normalize": normalize, "scale": scale, "segments": segments}

    def form(backend, *x):
        return flat(*x, feature_map=feature_map, backend=backend, **options)

    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, given, dtype, valid, "triton")


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize("T", [1, 37, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
@pytest.mark.parametrize("feature_map", MAPS)
def test_lengths(feature_map, T, kind):
    check(T, feature_map, kind, torch.float32)


# Hedgehog's tiles are as wide as X; Taylor's begin and end anywhere between its products.
@pytest.mark.parametrize("X", [1, 16, 24, 33, 64])
@pytest.mark.parametrize("feature_map", ["taylor_compressed", "hedgehog"])
def test_widths(feature_map, X):
    check(CHUNK + 3, feature_map, "packed", torch.float32, X=X, V=33, B=1, H=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("normalize", "with_state"), [(False, True), (True, False)])
@pytest.mark.parametrize("feature_map", MAPS)
def test_options(feature_map, normalize, with_state, dtype):
    options = {"normalize": normalize, "with_state": with_state}
    check(CHUNK + 3, feature_map, "padded", dtype, **options)


@pytest.mark.parametrize("feature_map", MAPS)
def test_wide_inputs_with_narrow_values(feature_map):
    """As under autocast: a map of float32 and values of bfloat16, whose dtype features get."""
    q, k, v = inputs(CHUNK + 3, feature_map, with_state=False)
    q, k, v = q.float(), k.float(), v.bfloat16()
    y = linear_attention(q, k, v, feature_map=feature_map, backend="triton")
    expected = linear_attention(
        q.double(), k.double(), v.double(), feature_map=feature_map, backend="reference"
    )
    assert y.dtype is torch.bfloat16
    assert_close("y", y, expected, 2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("spread", [1e4, 16])
def test_extreme_inputs_of_hedgehog(spread):
    check_extreme(spread)


def check_extreme(spread=16):
    """Softmaxes of one feature; sums of few weights, of others at their floor or about it."""
    given = inputs(3, "hedgehog", with_state=False, B=8)
    given[:2] = [x * spread for x in given[:2]]
    given = [x.float().requires_grad_() for x in given]
    results = []
    for backend in ("triton", "reference"):
        y = linear_attention(*given, eps=1e-12, feature_map="hedgehog", backend=backend)
        assert isinstance(y, torch.Tensor)
        results.append([y, *torch.autograd.grad(y.sum(), given)])
    for name, got, expected in zip(("y", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, got.detach(), expected.detach(), TOLERANCE[torch.float32])


def test_features_never_reach_memory(guards):
    """No tensor that a kernel is given has K features for every token."""
    T, X = CHUNK + 1, 16
    K = num_features(X, "taylor")
    given = [x.float() for x in inputs(T, "taylor", B=1, H=1, X=X, with_state=False)]
    given = [x.requires_grad_() for x in given]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = linear_attention(*given, feature_map="taylor", backend="triton")
    assert isinstance(y, torch.Tensor)
    y.sum().backward()
    assert any("differentiate_inputs" in name for name in guards)
    assert not [shapes for shapes in guards.shapes if f"(1, {T}, 1, {K})" in shapes]
    assert max(x.numel() for x in kept) < T * K


def test_inputs_wider_than_a_tile_have_their_features_made_in_front():
    check(5, "hedgehog", None, torch.float32, X=70, B=1, H=1)


def test_operators_keep_torchs_rules():
    q, k, v, S, z = (x[:1, :5].float() for x in inputs(5, "hedgehog", H=1, X=3, V=2))
    given = [*(x.requires_grad_() for x in (q, k, v, torch.cat([S, z[..., None]], -1))), None]
    options = (1.0, True, 1e-6, "triton", "hedgehog")
    check_operator(torch.ops.seqmix.linear_attention, (*given, *options))
    y, end, sums = torch.ops.seqmix.linear_attention(*given, *options)
    args = [x if x is None else x.detach() for x in (y, end, *given, y, sums)]
    args += [1.0, "triton", "hedgehog"]
    check_operator(torch.ops.seqmix.linear_attention_backward, args)


MUTANTS = {
    "both softmaxes of x": ("tl.where(at < X, z, -z)", "tl.where(at < X, z, z)"),
    "no floor": ("tl.maximum(_softmax_tile(x, rows, there, at, own, X), SMALLEST)",
                 "_softmax_tile(x, rows, there, at, own, X) * 1"),
    "another tile's features": ("own = own & (lanes < TILE)", "own = own & (lanes < BK)"),
    "the second softmax's gradient added": (
        "* tl.where(at < X, 1.0, -1.0)[None]", "* 1.0"
    ),
    "a floor with a gradient": ("tl.where(p > SMALLEST, p * dphi, 0)", "p * dphi"),
}  # fmt: skip
TAYLOR_MUTANTS = {
    "squares as products": ("tl.where(a == b, ROOT_HALF, 1.0)", "tl.where(a == b, 1.0, 1.0)"),
    "the rows' stride": ("b = i - a * (a + 1) // 2", "b = i - a * (a - 1) // 2"),
    "half of a product's gradient": (
        "return dx + dot(dphi * _take(x, rows, there, left, X), to_right, DOT)", "return dx"
    ),
    "no constant": ("tl.where(columns[None] < 0, 1.0, values)", "values"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("feature_map", "mutant"),
    [("hedgehog", m) for m in MUTANTS.values()]
    + [("taylor_compressed", m) for m in TAYLOR_MUTANTS.values()],
    ids=[*MUTANTS, *TAYLOR_MUTANTS],
)
def test_mutants_are_caught(monkeypatch, tmp_path, feature_map, mutant):
    mutate(monkeypatch, tmp_path, f"{MODULE}_features", *mutant)
    importer = tmp_path / "importer"
    importer.mkdir()
    mutate(monkeypatch, importer, MODULE, "def sums(", "def sums(")  # again, with the mutant

    def check_all():
        check(CHUNK + 3, feature_map, "packed", torch.float32)
        check_extreme()

    with pytest.raises(AssertionError):
        check_all()
