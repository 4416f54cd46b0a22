"""Linear attention: forms, states, documents, gradients, golden arrays, cost.

B batch, T time, H heads, K features, V value width.
"""

import math
import statistics
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from kernels import precision
from kernels.dispatch import BackendError
from kernels.linear_attention import (
    CHUNK,
    features,
    linear_attention,
    linear_attention_flops,
    num_features,
)
from tests.kernels.compare import (
    CPP,
    TOLERANCE,
    LargestTensor,
    assert_close,
    assert_forms_agree,
    assert_repeats_with_any_number_of_threads,
    bytes_kept_for_backward,
    check_operator,
    documents,
    needs_compiler,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "hedgehog_linear_attention.npz"
LENGTHS = (1, 2, 37, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5)
FORMS = pytest.mark.parametrize("backend", ["torch", CPP])
blocks = import_module("kernels.linear_attention.blocks")
cpp = import_module("kernels.linear_attention.cpp")
chunked = import_module("kernels.linear_attention.chunked")
tiles = import_module("kernels.linear_attention.tiles")


def inputs(T: int, B=3, H=2, K=5, V=3, dtype=torch.float64) -> list[Tensor]:
    """q, k positive, v, and a state S, z."""
    torch.manual_seed(T)
    q, k = torch.rand(2, B, T, H, K, dtype=dtype) + 0.1
    state = [torch.rand(B, H, K, V, dtype=dtype), torch.rand(B, H, K, dtype=dtype)]
    return [q, k, torch.randn(B, T, H, V, dtype=dtype), *state]


def flat(q, k, v, S=None, z=None, **options):
    """y, S, z after the call."""
    state = None if S is None else (S, z)
    y, (S, z) = linear_attention(q, k, v, initial_state=state, return_state=True, **options)
    return y, S, z


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("T", LENGTHS)
def test_forms_agree(T, kind, dtype, backend):
    segments = documents(3, T, kind)
    valid = None if segments is None else segments >= 0
    for normalize, with_state, scale in ((True, True, 0.5), (False, True, 0.5), (True, False, 1.0)):
        given = inputs(T)[: 5 if with_state else 3]

        def form(backend, *x, options={"scale": scale, "normalize": normalize}):  # noqa: B006
            return flat(*x, segments=segments, backend=backend, **options)

        assert_forms_agree(form, given, dtype, valid, backend)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (16, 80), (130, 1), (1, 47), (33, 48)])
def test_cpp_at_widths_around_its_vectors(widths, dtype):
    """The column of ones begins a vector of its own or not; inputs of any strides."""
    q, k, v, S, z = inputs(2 * CHUNK + 7, 2, 2, *widths)
    segments = documents(2, 2 * CHUNK + 7, "packed")

    def form(backend, q, k, v, S, z):
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
        options = {"backend": backend, "scale": 0.5}
        y, *end = flat(q, k, v, S, z, **options)
        return [y, *end, *flat(q, k, v, S, z, segments=segments, normalize=False, **options)]

    assert_forms_agree(form, [q, k, v, S, z], dtype, None, "cpp")


@needs_compiler
@pytest.mark.parametrize("normalize", [True, False])
def test_cpp_repeats_to_the_bit_with_any_number_of_threads(normalize):
    given = [x.requires_grad_() for x in inputs(300, 2, 4, 32, 32, torch.float32)]

    def run() -> list[Tensor]:
        outputs = flat(*given, normalize=normalize, backend="cpp")
        loss = sum(y.square().sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, given)]

    assert_repeats_with_any_number_of_threads(run)


@pytest.fixture(params=["vectors", "tiles"])
def products(request, monkeypatch) -> None:
    """How C++ multiplies bfloat16, whatever the CPU: without AMX what tiles do is imitated."""
    monkeypatch.setattr(tiles, "has_amx", lambda: request.param == "tiles")
    if request.param == "tiles":
        precision.has_amx()  # asks for the registers, where there are any


@needs_compiler
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("widths", [(5, 3), (64, 64), (130, 1), (33, 48), (3, 47)])
def test_bfloat16_in_cpp(products, widths, kind):
    """Inputs of any strides; every length around pairs of tiles; a document in many chunks."""
    for T in (1, 16, 31, 33, CHUNK, CHUNK + 1, 4 * CHUNK + 40):
        segments = documents(3, T, kind)
        valid = None if segments is None else segments >= 0

        for normalize, count in ((True, 5), (False, 5), (True, 3)):

            def form(backend, q, k, v, *state, segments=segments, normalize=normalize):
                q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
                options = {"segments": segments, "backend": backend, "scale": 0.5}
                return flat(q, k, v, *state, normalize=normalize, **options)

            given = inputs(T, 3, 2, *widths)[:count]
            assert_forms_agree(form, given, torch.bfloat16, valid, "cpp")


@needs_compiler
@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize("X", [1, 5, 16, 40, 64])
def test_features_of_bfloat16_in_cpp(products, X, kind):
    """Tiles make Hedgehog's themselves: of float32 queries and keys, as a layer has them."""
    T = 2 * CHUNK + 9
    q, k, v, *_ = inputs(T, 3, 2, X, 40)
    state = inputs(T, 3, 2, 2 * X, 40)[3:]
    segments = documents(3, T, kind)
    valid = None if segments is None else segments >= 0
    for wide in (torch.bfloat16, torch.float32):
        for normalize in (True, False):

            def form(backend, q, k, *rest, wide=wide, normalize=normalize):
                if backend == "cpp":
                    q, k = q.to(wide), k.to(wide)
                options = {"segments": segments, "normalize": normalize, "backend": backend}
                return flat(4 * q - 2, 4 * k - 2, *rest, feature_map="hedgehog", **options)

            assert_forms_agree(form, [q, k, v, *state], torch.bfloat16, valid, "cpp")


@needs_compiler
def test_smallest_features_in_cpp(products):
    """Of queries and keys whose features are one and zeros, at different places: only the least
    value that a feature has keeps the weights from being zero, and nothing has a gradient."""
    v = inputs(8, 1, 1, 4, 3)[2]
    q, k = torch.zeros(2, 1, 8, 1, 16, dtype=torch.float64)
    q[..., 0], q[..., 1], k[..., 2], k[..., 3] = 200, -200, 200, -200

    def form(backend, *x):
        return [linear_attention(*x, eps=0.0, feature_map="hedgehog", backend=backend)]

    assert_forms_agree(form, [q, k, v], torch.bfloat16, None, "cpp")


@needs_compiler
def test_no_features_reach_memory_where_tiles_make_them(monkeypatch):
    precision.has_amx()  # asks for the registers, where there are any
    monkeypatch.setattr(tiles, "has_amx", lambda: True)
    q, k, v, *_ = (x.float() for x in inputs(512, 1, 2, 64, 8))
    with LargestTensor() as largest, torch.no_grad():
        linear_attention(q, k, v.bfloat16(), feature_map="hedgehog", backend="cpp")
    assert largest.numel < 512 * 2 * 128


@needs_compiler
@pytest.mark.parametrize("normalize", [True, False])
def test_bfloat16_in_cpp_repeats_to_the_bit_with_any_number_of_threads(products, normalize):
    given = [x.bfloat16().requires_grad_() for x in inputs(300, 2, 4, 32, 32)[:3]]

    def run() -> list[Tensor]:
        outputs = flat(*given, normalize=normalize, backend="cpp")
        loss = sum(y.square().sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, given)]

    assert_repeats_with_any_number_of_threads(run)


@needs_compiler
def test_products_with_the_future_may_overflow_in_cpp(products):
    """Within a chunk every query meets every key; those behind it are no part of its output."""
    q, k, v = (x.bfloat16() for x in inputs(CHUNK, 1, 1, 32, 32)[:3])
    expected = linear_attention(q, k, v, backend="cpp")
    k[:, CHUNK // 2 :] = 1e30
    q[:, 0] = 1e30
    y = linear_attention(q, k, v, backend="cpp")
    assert torch.equal(y[:, 1 : CHUNK // 2], expected[:, 1 : CHUNK // 2])
    assert_close("y", y[:, 0], v[:, 0], TOLERANCE[torch.bfloat16])


@needs_compiler
def test_auto_is_cpp_with_tiles_or_without(products):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.requires_grad_() for x in inputs(70, dtype=dtype)[:3])
        assert torch.equal(linear_attention(q, k, v), linear_attention(q, k, v, backend="cpp"))


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize("T", [37, 2 * CHUNK + 5])
def test_products_in_bfloat16(monkeypatch, T, kind):
    """As on a CPU with AMX or a GPU; elsewhere bfloat16 inputs are widened."""
    monkeypatch.setattr(precision, "has_amx", lambda: True)
    segments = documents(3, T, kind)

    def form(backend, *x):
        return flat(*x, segments=segments, backend=backend)

    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, inputs(T, K=16, V=16), torch.bfloat16, valid)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("T", [1, 2, 3, CHUNK])
def test_without_gradients_the_same(T, normalize):
    """Decoding takes other code than training for a few tokens."""
    for kind, count in ((None, 5), (None, 3), ("padded", 5)):
        given = inputs(T)[:count]
        options = {"segments": documents(3, T, kind), "normalize": normalize, "scale": 0.7}
        trained = flat(*[x.requires_grad_() for x in given], **options)
        with torch.no_grad():
            decoded = flat(*given, **options)
        for a, b in zip(decoded, trained, strict=True):
            assert_close("without gradients", a, b.detach(), TOLERANCE[torch.float64])


def test_feature_maps_may_be_wider_than_values():
    """float32 features with bfloat16 values: the values' dtype out, a float32 state."""
    q, k, v, S, z = inputs(70, dtype=torch.float32)
    y, S_end, _ = flat(q, k, v.bfloat16(), S, z)
    expected = flat(*[x.double() for x in (q, k, v.bfloat16(), S, z)], backend="reference")
    assert (y.dtype, S_end.dtype) == (torch.bfloat16, torch.float32)
    assert_close("y", y, expected[0], TOLERANCE[torch.bfloat16])  # its own rounding
    assert_close("S", S_end, expected[1], TOLERANCE[torch.float32])


@FORMS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", [None, "padded"])
def test_gradcheck_over_chunks(monkeypatch, kind, normalize, backend):
    for module in (blocks, cpp):
        monkeypatch.setattr(module, "CHUNK", 2)
    segments = documents(2, 5, kind)
    given = [x.requires_grad_() for x in inputs(5, B=2, H=1, K=2, V=2)]

    def fn(*x):
        options = {"normalize": normalize, "scale": 0.7, "segments": segments}
        y, S, z = flat(*x, **options, backend=backend)
        return (y, S, z) if segments is None else (y[segments >= 0], S, z)

    assert torch.autograd.gradcheck(fn, given)


@FORMS
@pytest.mark.parametrize("kind", [None, "padded"])
def test_chunk_invariance(monkeypatch, kind, backend):
    T, segments = 70, documents(3, 70, kind)
    options = {"segments": segments, "backend": backend}
    expected = flat(*inputs(T), **options)
    for chunk, squares in ((1, 1 << 20), (3, 1), (16, 1), (16, 40_000), (T, 1), (T + 5, 1)):
        for module in (blocks, cpp):
            monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(blocks, "_SQUARES", {"cpu": squares})
        for got, e in zip(flat(*inputs(T), **options), expected, strict=True):
            assert_close(f"chunks of {chunk}", got, e, TOLERANCE[torch.float64])


@FORMS
@pytest.mark.parametrize("cut", [1, 36, CHUNK, CHUNK + 1])
def test_split_and_continue(cut, backend):
    q, k, v, S, z = inputs(2 * CHUNK + 5)
    y, *end = flat(q, k, v, S, z, backend=backend)
    first, *middle = flat(q[:, :cut], k[:, :cut], v[:, :cut], S, z, backend=backend)
    second, *got = flat(q[:, cut:], k[:, cut:], v[:, cut:], *middle, backend=backend)
    assert_close("y", torch.cat([first, second], 1), y, TOLERANCE[torch.float64])
    for a, b in zip(got, end, strict=True):
        assert_close("state", a, b, TOLERANCE[torch.float64])


@pytest.mark.parametrize("normalize", [True, False])
def test_documents_equal_separate_runs(normalize):
    """Also: the initial state is the first document's, the final state the last one's."""
    T, B = 150, 3
    segments = documents(B, T, "padded")
    q, k, v, S, z = inputs(T)
    y, S_end, z_end = flat(q, k, v, S, z, segments=segments, normalize=normalize)
    for b in range(B):
        past = ends = [S[b : b + 1], z[b : b + 1]]
        for name in [n for n in segments[b].unique().tolist() if n >= 0]:
            at = segments[b] == name
            own = [x[b : b + 1, at] for x in (q, k, v)]
            one, *ends = flat(*own, *past, normalize=normalize)
            assert_close(f"document {name}", y[b : b + 1, at], one, TOLERANCE[torch.float64])
            past = [torch.zeros_like(x) for x in past]
        assert_close("S", S_end[b : b + 1], ends[0], TOLERANCE[torch.float64])
        assert_close("z", z_end[b : b + 1], ends[1], TOLERANCE[torch.float64])


@FORMS
def test_padding_is_finite_even_without_eps(backend):
    given = [x.requires_grad_() for x in inputs(70)[:3]]
    segments = torch.full((3, 70), -1)
    y = linear_attention(*given, eps=0.0, segments=segments, backend=backend)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), given))


@pytest.mark.golden("hedgehog_linear_attention", mixers=["hedgehog", "linear_attention"])
@pytest.mark.parametrize("backend", ["torch", CPP, "reference"])
def test_golden(backend):
    """Tolerance: both sides are float32."""
    data = {name: torch.from_numpy(a) for name, a in np.load(GOLDEN).items()}
    q, k, v = (data[n].transpose(1, 2) for n in ("phi_q", "phi_k", "v"))
    cut = int(data["split_at"])
    y, S, z = flat(q, k, v, eps=1e-12, backend=backend)
    _, S_cut, z_cut = flat(q[:, :cut], k[:, :cut], v[:, :cut], eps=1e-12, backend=backend)
    plain = linear_attention(q, k, v, normalize=False, backend=backend)
    scaled = linear_attention(
        q, k, v, normalize=False, scale=float(data["fla_scale"]), backend=backend
    )
    got = {
        "y_causal": y.transpose(1, 2),
        "numerator": plain.transpose(1, 2),
        "fla_unnormalised_scaled": scaled.transpose(1, 2),
        "state_kv_final": S,
        "state_k_final": z[:, :, None],
        "state_kv_split": S_cut,
        "state_k_split": z_cut[:, :, None],
    }
    for name, value in got.items():
        torch.testing.assert_close(value, data[name], rtol=1e-4, atol=1e-5, msg=name)
    weights = linear_attention(  # values that are the unit vectors: the weights themselves
        q, k, torch.eye(37).expand(2, 2, 37, 37).transpose(1, 2), eps=1e-12, backend=backend
    )
    torch.testing.assert_close(weights.transpose(1, 2), data["attn_causal"], rtol=1e-4, atol=1e-5)


def test_constant_values_pass_unchanged():
    q, k, _, *_ = inputs(100)
    y = linear_attention(q, k, torch.full((3, 100, 2, 3), 2.5, dtype=torch.float64), eps=0.0)
    assert_close("y", y, torch.full_like(y, 2.5), TOLERANCE[torch.float64])


def test_sums_of_bfloat16_are_float32():
    """In bfloat16 a sum of ones stops at 256."""
    one = torch.ones(1, 3000, 1, 1, dtype=torch.bfloat16)
    y, S, z = flat(one, one, one, normalize=False)
    assert (S.item(), z.item()) == (3000, 3000)
    assert_close("y", y.flatten(), torch.arange(1, 3001).double(), 2**-8)  # y itself is rounded


@FORMS
def test_bfloat16_stays_finite(backend):
    q, k, v = (x.bfloat16() for x in inputs(200)[:3])
    tiny, huge = torch.tensor(1e-30).bfloat16(), torch.tensor(1e15).bfloat16()
    for scale in (tiny, huge):
        given = [(q * scale).requires_grad_(), (k * scale).requires_grad_(), v.requires_grad_()]
        y = linear_attention(*given, backend=backend)
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), given))


@pytest.mark.parametrize("T", [1, 3, CHUNK + 3])
def test_the_given_state_stays_and_repeats_are_equal(T):
    given = inputs(T)
    before = [x.clone() for x in given]
    first, second = flat(*given), flat(*given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_autocast_changes_nothing():
    given = [x.float() for x in inputs(70)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = flat(*given)
    assert all(torch.equal(a, b) for a, b in zip(inside, flat(*given), strict=True))


@pytest.mark.parametrize("normalize", [True, False])
def test_flops(normalize):
    """The formula is what is counted at every length, and what the products come to."""
    for T in LENGTHS:
        q, k, v = inputs(T)[:3]
        B, _, H, K, V = *q.shape, v.shape[3]
        formula = linear_attention_flops(B, T, H, K, V, normalize=normalize)
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            linear_attention(q, k, v, normalize=normalize)
        with FlopCounterMode(display=False) as counted_training:
            linear_attention(q.clone().requires_grad_(), k, v, normalize=normalize)
        assert counted.get_total_flops() == counted_training.get_total_flops() == formula
        if T % CHUNK == 0:
            with FlopCounterMode(display=False) as products:
                y, _, sums = chunked.forward(q, k, v, None, None, 1.0, normalize, 1e-6)
            assert products.get_total_flops() == formula
            with FlopCounterMode(display=False) as products:
                chunked.backward(y, None, q, k, v, None, None, y, sums, 1.0)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            y = linear_attention(*leaves, normalize=normalize)
            with FlopCounterMode(display=False) as counted:
                y.sum().backward()
            assert products.get_total_flops() == counted.get_total_flops()


def test_no_tensor_holds_a_state_per_token():
    q, k, v = inputs(1024, B=1, H=2, K=32, V=32, dtype=torch.float32)[:3]
    with LargestTensor() as largest:
        y, _, sums = chunked.forward(q, k, v, None, None, 1.0, True, 1e-6)
        chunked.backward(y, None, q, k, v, None, None, y, sums, 1.0)
    assert largest.numel <= 3 * q.numel()  # a state per token would be 32 times q


def test_kept_memory_is_linear():
    def kept(T: int) -> int:
        given = [x.requires_grad_() for x in inputs(T, B=1, dtype=torch.float32)[:3]]
        segments = (torch.arange(T) // 300)[None]
        return bytes_kept_for_backward(lambda: linear_attention(*given, segments=segments))

    slope = math.log(kept(16384) / kept(2048)) / math.log(8)
    assert slope == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("feature_map", ["hedgehog", "taylor", "taylor_compressed"])
@pytest.mark.parametrize("T", [1, 70])
def test_a_feature_map_is_its_features(T, feature_map, backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, T, 2, 6, dtype=torch.float64)
    maps = {"feature_map": feature_map, "return_state": True, "backend": backend}
    y, state = linear_attention(q, k, v, **maps)
    again, _ = linear_attention(q, k, v, initial_state=state, **maps)
    q, k = features(q, feature_map), features(k, feature_map)
    assert q.shape[3] == num_features(6, feature_map)
    expected, end = linear_attention(q, k, v, return_state=True, backend=backend)
    for got, wanted in zip((y, *state), (expected, *end), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(again, linear_attention(q, k, v, initial_state=end, backend=backend))


def test_taylor_features_are_its_polynomial():
    x, y = torch.randn(2, 2, 3, 2, 5, dtype=torch.float64)
    s = (x * y).sum(-1)
    for feature_map in ("taylor", "taylor_compressed"):
        product = (features(x, feature_map) * features(y, feature_map)).sum(-1)
        torch.testing.assert_close(product, 1 + s + s**2 / 2)


@needs_compiler
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "V"), [(5, 3), (33, 70), (600, 64)])  # the last takes two threads
def test_steps_in_cpp(K, V, dtype):
    """Tokens without gradients, one or three, with a past, a document's first and padding."""
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    for T, kind in ((1, None), (3, None), (1, "padded")):
        q, k, v, *state = inputs(T, H=8, K=K, V=V)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        for past in (None, tuple(state)):
            for normalize in (True, False):
                options = {"initial_state": past, "segments": documents(3, T, kind), "scale": 0.5}
                options |= {"normalize": normalize, "return_state": True}
                y, (S, z) = linear_attention(q, k, v, **options)
                expected, end = linear_attention(
                    q.double(), k.double(), v.double(), backend="reference", **options
                )
                if options["segments"] is not None:  # an output of padding is not specified
                    padding = (options["segments"] < 0)[..., None, None]
                    y, expected = y.masked_fill(padding, 0), expected.masked_fill(padding, 0)
                assert y.dtype is dtype
                for got, wanted in zip((y, S, z), (expected, *end), strict=True):
                    assert_close("a step", got, wanted, tolerance)


@needs_compiler
def test_steps_in_cpp_of_any_tensors():
    """Dtypes that differ, padding that is not contiguous: as in torch."""
    q, k, v, S, z = inputs(1)
    steps = torch.ops.seqmix.linear_attention_steps
    padding = torch.tensor([[False, True, True], [True, False, False], [False] * 3])[:, :1]
    for given in (
        (q.float(), k.bfloat16(), v.float()),
        (q.float(), k.float(), v.bfloat16()),
        (q.bfloat16(), k.float(), v.half()),
        (q.float(), k, v.bfloat16()),
    ):
        expected = steps(*given, S, z, padding, 0.5, True, 0.1, "step")
        got = steps(*given, S, z, padding, 0.5, True, 0.1, "cpp")
        assert got[0].dtype is given[2].dtype
        for a, b in zip(got, expected, strict=True):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b)


def test_operators_keep_torchs_rules():
    q, k, v, S, z = (x[:2] for x in inputs(5, K=2, V=2))
    E = torch.cat([S, z[..., None]], -1)
    for segments in (None, documents(2, 5, "padded")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, E)]
        check_operator(torch.ops.seqmix.linear_attention, (*leaves, segments, 1.0, True, 1e-6))
        y, end, sums = torch.ops.seqmix.linear_attention(*leaves, segments, 1.0, True, 1e-6)
        check_operator(
            torch.ops.seqmix.linear_attention_backward,
            [x if x is None else x.detach() for x in (y, end, *leaves, segments, y, sums)] + [1.0],
        )
    padding = torch.tensor([[True], [False]])
    one = [x[:, :1] for x in (q, k, v)]
    check_operator(torch.ops.seqmix.linear_attention_steps, (*one, S, z, padding, 1.0, True, 1e-6))


@pytest.mark.slow
def test_compiled_equals_eager():
    for T in (1, 70):
        given = [x.float().mT.contiguous().mT for x in inputs(T)]  # an unusual layout
        given = [x.requires_grad_() for x in given]
        segments = documents(3, T, "padded")

        def fn(*x, segments=segments):
            return flat(*x, segments=segments)

        eager, compiled = fn(*given), torch.compile(fn, fullgraph=True)(*given)
        loss = [sum(y.sum() for y in out) for out in (eager, compiled)]
        grads = [torch.autograd.grad(one, given) for one in loss]
        for a, b in zip((*compiled, *grads[1]), (*eager, *grads[0]), strict=True):
            assert_close("compiled", a.detach(), b.detach(), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.rand(2, 5, 2)}, r"q has shape \(2, 5, 2\); expected \(B, T, H, K\)"),
        ({"q": torch.rand(2, 0, 2, 4), "k": torch.rand(2, 0, 2, 4)}, "must be at least 1"),
        ({"k": torch.rand(2, 6, 2, 4)}, r"k has shape \(2, 6, 2, 4\).* = \(2, 5, 2, 4\)"),
        ({"v": torch.rand(2, 5, 1, 3)}, r"v has shape \(2, 5, 1, 3\)"),
        ({"v": torch.ones(2, 5, 2, 3, dtype=torch.int64)}, "v is torch.int64"),
        ({"segments": torch.zeros(2, 5)}, "segments is torch.float32; expected an integer"),
        ({"segments": torch.zeros(2, 4, dtype=torch.long)}, r"segments has shape \(2, 4\)"),
        ({"initial_state": (torch.rand(2, 2, 3, 4), torch.rand(2, 2, 4))}, r"initial_state\[0\]"),
        ({"initial_state": (torch.rand(2, 2, 4, 3), torch.rand(2, 2, 3))}, r"initial_state\[1\]"),
        ({"feature_map": "elu"}, "feature_map='elu': allowed: None, hedgehog, taylor, taylor_com"),
        (
            {
                "feature_map": "hedgehog",
                "initial_state": (torch.rand(2, 2, 4, 3), torch.rand(2, 2, 4)),
            },
            r"initial_state\[0\] has shape \(2, 2, 4, 3\); expected .* = \(2, 2, 8, 3\)",
        ),
    ],
)
def test_bad_input(change, message):
    good = {"q": torch.rand(2, 5, 2, 4), "k": torch.rand(2, 5, 2, 4), "v": torch.rand(2, 5, 2, 3)}
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**good, **change})


def test_unknown_backend():
    with pytest.raises(BackendError, match=r"'cuda'.*allowed: auto, reference, torch"):
        linear_attention(*inputs(3)[:3], backend="cuda")


def ratio(slow, fast, rounds: int = 5) -> float:
    """Median over rounds of slow / fast, one after the other."""
    ratios = []
    slow(), fast()
    for _ in range(rounds):
        start = time.perf_counter()
        slow()
        middle = time.perf_counter()
        fast()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_six_times_as_fast_as_softmax_attention(training):
    B, T, H, K = 2, 8192, 4, 64
    torch.use_deterministic_algorithms(False)  # filling memory is no part of either
    torch.manual_seed(0)
    given = [torch.rand(B, T, H, K).bfloat16().requires_grad_(training) for _ in range(3)]

    def run(attend):
        y = attend(*given)
        if training:
            torch.autograd.grad(y.sum(), given)

    def softmax(q, k, v):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads, is_causal=True)

    def linear(q, k, v):
        return linear_attention(q, k, v, normalize=False)

    measured = ratio(lambda: run(softmax), lambda: run(linear), 3 if training else 5)
    print(f"linear attention is {measured:.1f} times as fast, training={training}")
    assert measured >= 6
