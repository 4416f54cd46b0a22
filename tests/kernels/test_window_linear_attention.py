"""Window-and-linear attention: the dense formula, both forms, caches, documents, cost.

B batch, T queries, S keys, H heads, D head width, F features, V value width, W window.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from kernels.linear_attention import linear_attention
from kernels.segments import first_document, last_document
from kernels.window_linear_attention import (
    leaving,
    window_linear_attention,
    window_linear_attention_flops,
)
from tests.kernels.compare import (
    LargestTensor,
    assert_forms_agree,
    bytes_kept_for_backward,
    documents,
)

BACKENDS = ("reference", "torch", "auto")
H, D, F, V = 2, 4, 6, 5
G = torch.tensor([0.3, 0.8], dtype=torch.float64)


def inputs(S: int, B: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, phi(q), phi(k) of S positions."""
    generator = torch.Generator().manual_seed(S)
    widths = (D, D, V, F, F)
    q, k, v, *phi = (
        torch.randn(B, S, H, w, generator=generator, dtype=torch.float64).to(dtype) for w in widths
    )
    return [q, k, v, *(x.exp() for x in phi)]


def run(q, k, v, phi_q, phi_k, window, segments=None, T=None, **options):
    """The operator on the last T queries, with what left the window before them as its past."""
    S = k.shape[1]
    T = S if T is None else T
    (phi_left, v_left), there = leaving(window, S, segments, phi_k, v)
    phi_left = phi_left.masked_fill(~there[..., None, None], 0)
    before = None
    if T < S:
        past = segments if segments is None else segments[:, : S - T]
        _, before = linear_attention(
            *(x[:, : S - T] for x in (phi_q, phi_left, v_left)), return_state=True, segments=past
        )
        if segments is not None:  # a row that starts anew has no past
            goes_on = first_document(segments[:, S - T :]) == last_document(segments[:, : S - T])
            before = tuple(x * goes_on.view(-1, *[1] * (x.ndim - 1)) for x in before)
    return window_linear_attention(
        *(x[:, S - T :] if x is q else x for x in (q, k, v)),
        *(x[:, S - T :] for x in (phi_q, phi_left, v_left)),
        window=window,
        initial_state=before,
        segments=segments,
        **{"window_weight": G.to(q.dtype), "linear_weight": 1.0, **options},
    )


def dense(q, k, v, phi_q, phi_k, window, segments=None, g=G, a: Tensor | float = 1.0):
    """The formula with all weights in one matrix, and the two masks."""
    B, S = q.shape[:2]
    segments = torch.zeros(B, S, dtype=torch.int64) if segments is None else segments
    place = (segments >= 0).cumsum(1)
    past = torch.ones(S, S, dtype=torch.bool).tril() & (segments[:, :, None] == segments[:, None])
    near = past & (place[:, :, None] - place[:, None] < window)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    scores = scores.masked_fill(~near[:, None], float("-inf"))
    largest = scores.amax(-1, keepdim=True) if window else 0
    far = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k).masked_fill(~(past & ~near)[:, None], 0)
    g, a = (w[:, None, None] if isinstance(w, Tensor) else w for w in (g, a))
    weights = g * (scores - largest).exp() + a * far
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)
    return torch.einsum("bhij,bjhv->bihv", weights, v)


def assert_same(got: Tensor, expected: Tensor, segments: Tensor | None = None) -> None:
    assert got.isfinite().all()
    if segments is not None:
        valid = (segments[:, -got.shape[1] :] >= 0)[..., None, None]
        got, expected = got * valid, expected * valid
    # float64, sums of at most a few hundred terms in another order
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("window", [0, 1, 7, 64, 200])
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130])
def test_equals_the_dense_formula(length, window, kind, backend):
    args, segments = inputs(length), documents(2, length, kind)
    got = run(*args, window, segments, backend=backend)
    assert_same(got, dense(*args, window, segments), segments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize(("length", "T"), [(40, 1), (40, 13), (150, 70)])
def test_later_queries_with_the_keys_before_them(length, T, kind, backend):
    args, segments = inputs(length), documents(2, length, kind)
    got = run(*args, 7, segments, T=T, backend=backend)
    assert_same(got, dense(*args, 7, segments)[:, length - T :], segments)


@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forms_agree_and_so_do_their_gradients(dtype, kind):
    length, window = 70, 9
    q, k, v, phi_q, phi_k = inputs(length, B=3)
    segments = documents(3, length, kind)
    generator = torch.Generator().manual_seed(0)
    S, z = (torch.rand(3, H, F, *w, generator=generator).double() for w in ((V,), ()))

    def form(backend, q, k, v, phi_q, phi_k, S, z, g, a):
        (phi_left, v_left), there = leaving(window, length, segments, phi_k, v)
        y, (S, z) = window_linear_attention(
            q,
            k,
            v,
            phi_q,
            phi_left.masked_fill(~there[..., None, None], 0),
            v_left,
            window=window,
            window_weight=g,
            linear_weight=a,
            initial_state=(S, z),
            return_state=True,
            segments=segments,
            backend=backend,
        )
        return y, S, z

    tensors = [q, k, v, phi_q, phi_k, S, z, G, 1 - G]
    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, tensors, dtype, valid)


@pytest.mark.parametrize("window", [0, 3])
def test_gradients(window):
    args = [a.requires_grad_() for a in inputs(6, B=1)]
    assert torch.autograd.gradcheck(lambda *a: run(*a, window, backend="torch"), args)


def test_a_window_of_everything_is_softmax_attention():
    q, k, v, *phi = inputs(33)
    got = run(q, k, v, *phi, 33)
    expected = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    # eps / g = 1e-11 stands in the normaliser of a sum that is at least 1
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_no_window_is_linear_attention():
    q, k, v, phi_q, phi_k = inputs(70)
    expected = linear_attention(phi_q, phi_k, v, eps=1e-12)
    assert_same(run(q, k, v, phi_q, phi_k, 0), expected)


def test_a_part_that_is_left_out():
    args = inputs(70)
    near, far = run(*args, 9, linear_weight=0.0), run(*args, 9, window_weight=0.0)
    assert_same(near, dense(*args, 9, a=0.0))
    assert_same(far[:, 9:], dense(*args, 9, g=torch.zeros(H, dtype=torch.float64))[:, 9:])
    assert not far[:, :9].any(), "there is nothing behind the window yet"
    with pytest.raises(ValueError, match="both parts are left out"):
        run(*args, 9, window_weight=0.0, linear_weight=0.0)


def test_the_two_parts_share_the_past_between_them():
    """Every pair of a causal triangle is either in the window or behind it, never both."""
    length, window = 20, 6
    q, k, _, phi_q, phi_k = inputs(length, B=1)
    v = torch.eye(length, dtype=torch.float64)[None, :, None].expand(1, -1, H, -1)
    near, far = (
        run(q, k, v, phi_q, phi_k, window, **{part: 0.0}) > 0
        for part in ("linear_weight", "window_weight")
    )
    assert not (near & far).any()
    triangle = torch.ones(length, length, dtype=torch.bool).tril()[None, :, None].expand_as(near)
    assert torch.equal(near | far, triangle)


@pytest.mark.parametrize("window", [0, 1, 64, 100, 1000])
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 129, 300])
def test_flops(length, window):
    args = inputs(length, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(*args, window)
    said = window_linear_attention_flops(2, length, H, D, F, V, window=window)
    assert counter.get_total_flops() == said


def test_no_tensor_grows_faster_than_the_length():
    sizes, kept = [], []
    for length in (512, 2048):
        args = [x.requires_grad_() for x in inputs(length, B=1, dtype=torch.float32)]
        with LargestTensor() as largest:
            run(*args, 64).sum().backward()
        sizes.append(largest.numel)
        kept.append(bytes_kept_for_backward(lambda args=args: run(*args, 64)))
    assert sizes[1] <= 4 * sizes[0] + 1000
    assert kept[1] <= 4 * kept[0] + 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": -1}, "window=-1; expected at least 0"),
        ({"q": (2, 0, H, D)}, "q has shape"),
        ({"k": (2, 4, H, D)}, "k has 4 positions; expected at least q's 5"),
        ({"phi_left": (2, 5, H, F + 1)}, "phi_left has shape"),
        ({"v_left": (2, 4, H, V)}, "v_left has shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    shapes = {
        "q": (2, 5, H, D),
        "k": (2, 5, H, D),
        "v": (2, 5, H, V),
        "phi_q": (2, 5, H, F),
        "phi_left": (2, 5, H, F),
        "v_left": (2, 5, H, V),
    }
    window = change.pop("window", 3)
    tensors = {name: torch.ones(*change.get(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        window_linear_attention(*tensors.values(), window=window, window_weight=1.0)
