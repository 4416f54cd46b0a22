"""Monarch products and projections: the public code's arrays, structure, optimality, cost.

w1 (k, q, p), w2 (l, s, r); n = k p inputs, k q = l r in the middle, l s outputs.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.monarch import monarch, monarch_flops, monarch_project
from kernels.monarch.reference import dense
from tests.kernels.compare import (
    TOLERANCE,
    assert_close,
    assert_forms_agree,
    bytes_kept_for_backward,
)

GOLDEN = Path(__file__).parents[1] / "golden"
EXACT = 1e-12  # the spec's bound for float64
# Of the blocks of `up` and `down`, some have rank 1 and some 2: l does not divide q.
SHAPES = {
    "square": ((4, 4, 4), (4, 4, 4)),
    "up": ((4, 6, 6), (4, 12, 6)),
    "down": ((4, 6, 12), (4, 6, 6)),
    "unequal": ((3, 4, 5), (2, 7, 6)),
    "one_block": ((1, 3, 5), (1, 4, 3)),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
# The arrays are float64 results; float32 has 6e-8 per operation, and gradients are longer sums.
GOLDEN_TOLERANCES = pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
    ids=["fp64", "fp32"],
)


def golden(name: str) -> dict[str, Tensor]:
    """The arrays of tests/golden/<name>.npz."""
    return {key: torch.from_numpy(array) for key, array in np.load(GOLDEN / f"{name}.npz").items()}


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.shape == expected.shape
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


def inputs(shape: str, dtype=torch.float64, rows=(2, 3)) -> list[Tensor]:
    """x, w1, w2."""
    torch.manual_seed(0)
    w1, w2 = SHAPES[shape]
    return [torch.randn(s, dtype=dtype) for s in ((*rows, w1[0] * w1[2]), w1, w2)]


@pytest.mark.golden("monarch_multiply", mixers=[])
@GOLDEN_TOLERANCES
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", ["sq16", "rect_24_48", "rect_48_24", "unequal", "sq24_6x4"])
def test_golden_products_and_gradients(case, backend, dtype, forward, backward):
    data = golden("monarch_multiply")
    leaves = [data[f"{case}_{name}"].to(dtype).requires_grad_() for name in ("x", "w1", "w2")]
    y = monarch(*leaves, backend=backend)
    assert_near(y, data[f"{case}_y"], forward)
    assert_near(dense(*leaves[1:]), data[f"{case}_dense"], forward)
    grads = torch.autograd.grad(y, leaves, data[f"{case}_cot"].to(dtype))
    for name, grad in zip(("x", "w1", "w2"), grads, strict=True):
        assert_near(grad, data[f"{case}_grad_{name}"], backward)


@pytest.mark.golden("monarch_project", mixers=[])
@GOLDEN_TOLERANCES
@pytest.mark.parametrize(
    ("case", "nblocks", "rank"),
    [
        ("sq16", 4, None),
        ("sq24", (6, 4), None),
        ("sq36", 6, None),
        ("rect_24x12_k3_j4_r1_b1", (3, 4), None),
        ("rect_24x12_k3_j4_r2_b1", (3, 4), 2),
        ("rank2", (3, 4), 2),
    ],
)
def test_golden_projections(case, nblocks, rank, dtype, forward, backward):
    data = golden("monarch_project")
    M = data[f"{case}_M"].to(dtype)
    w1, w2 = monarch_project(M, nblocks, rank)
    assert w1.dtype is w2.dtype is dtype
    assert_near(dense(w1, w2), data[f"{case}_proj"], forward)
    if case == "rank2":
        assert (w1.shape, w2.shape) == (data["rank2_w1"].shape, data["rank2_w2"].shape)
        given = [data[f"rank2_{name}"].to(dtype) for name in ("x", "w1", "w2")]
        assert_near(monarch(*given), data["rank2_y"], forward)
        return
    assert list(w1.shape) == data[f"{case}_w1_shape"].tolist()
    assert list(w2.shape) == data[f"{case}_w2_shape"].tolist()
    error = (dense(w1, w2) - M).norm().item()
    assert error == pytest.approx(data[f"{case}_fro_err"].item(), rel=forward)


@pytest.mark.golden("monarch_project", mixers=[])
def test_golden_projection_in_the_other_layout():
    """That code's outputs go (., block, 2) where ours go (., block): rows change places."""
    data, case = golden("monarch_project"), "rect_48x24_k4_j4_r3_b2"

    def swap(M, first, second):
        return M.view(6, first, second, 24).transpose(1, 2).reshape(48, 24)

    w1, w2 = monarch_project(swap(data[f"{case}_M"].double(), 4, 2), 4, 3)
    assert list(w1.shape) == data[f"{case}_w1_shape"].tolist()
    assert list(w2.shape) == data[f"{case}_w2_shape"].tolist()
    assert_near(swap(dense(w1, w2), 2, 4), data[f"{case}_proj"], 1e-9)


def test_worked_example():
    """Four numbers by hand; leaving out a permutation gives another order or other numbers."""
    w1 = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]])
    w2 = torch.tensor([[[1.0, 0], [0, 1]], [[1, 1], [1, -1]]])
    assert monarch(torch.ones(4), w1, w2).tolist() == [3, 22, 11, -8]
    assert dense(w1, w2).tolist() == [[1, 2, 0, 0], [3, 4, 7, 8], [0, 0, 5, 6], [3, 4, -7, -8]]


@each_shape
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forms_agree(shape, dtype):
    assert_forms_agree(lambda backend, *x: (monarch(*x, backend=backend),), inputs(shape), dtype)


@each_shape
def test_gradcheck_real_and_complex(shape):
    for dtype in (torch.float64, torch.complex128):
        leaves = [x.requires_grad_() for x in inputs(shape, dtype, rows=(2,))]
        assert torch.autograd.gradcheck(monarch, leaves)
        assert_near(monarch(*leaves), monarch(*leaves, backend="reference"), EXACT)


@each_shape
def test_blocks_have_the_stated_rank(shape):
    _, w1, w2 = inputs(shape)
    (k, q, p), (blocks, s, _) = w1.shape, w2.shape
    ranks = torch.linalg.matrix_rank(dense(w1, w2).view(s, blocks, k, p).permute(1, 2, 0, 3))
    assert ranks.sum() == k * q, "each number in the middle adds one to one block"
    assert {q // blocks, -(-q // blocks)} >= set(ranks.flatten().tolist())


def monarch_dft(n1: int, n2: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the inputs and the factors of the DFT of n1 n2 numbers."""
    n = n1 * n2
    a, b = torch.arange(n1), torch.arange(n2)

    def root(power, order):
        angle = (-2 * math.pi / order) * (power % order).double()
        return torch.polar(torch.ones_like(angle), angle)

    w1 = root(b[:, None, None] * a[:, None], n) * root(a[:, None] * a, n1)  # [b, k1, a]
    w2 = root(b[:, None] * b, n2).expand(n1, n2, n2)  # [k1, k2, b]
    return (n2 * a + b[:, None]).flatten(), w1, w2


@pytest.mark.parametrize(("n1", "n2"), [(4, 4), (6, 4), (8, 4)])
def test_holds_the_fourier_transform(n1, n2):
    order, w1, w2 = monarch_dft(n1, n2)
    x = torch.randn(3, n1 * n2, dtype=torch.complex128)
    assert_near(monarch(x[:, order], w1, w2), torch.fft.fft(x), EXACT)


def test_holds_hadamard_matrices_and_no_circulant():
    h2 = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    h16 = torch.kron(torch.kron(h2, h2), torch.kron(h2, h2))
    assert_near(dense(*monarch_project(h16, 4)), h16, EXACT)
    torch.manual_seed(0)
    column = torch.randn(16, dtype=torch.float64)
    circulant = torch.stack([column.roll(i) for i in range(16)], dim=1)
    error = (dense(*monarch_project(circulant, 4)) - circulant).norm() / circulant.norm()
    assert error > 0.3, "a convolution is no single Monarch matrix"
    # It is one between two: F^-1 diag(F c) F, F a Monarch matrix but for the inputs' order.
    order, w1, w2 = monarch_dft(4, 4)
    F = dense(w1, w2)[:, order.argsort()]
    product = torch.linalg.inv(F) @ torch.diag(F @ column.to(F.dtype)) @ F
    assert_near(product.real, circulant, EXACT)


@each_shape
def test_projection_is_exact_on_monarch_matrices(shape):
    _, w1, w2 = inputs(shape)
    k, blocks, q = len(w1), len(w2), w1.shape[1]
    M = dense(w1, w2)
    again = monarch_project(M, (k, blocks), None if q % blocks else q // blocks)
    assert [f.shape for f in again] == [w1.shape, w2.shape]
    assert_near(dense(*again), M, EXACT)


@pytest.mark.parametrize(
    ("out", "columns", "nblocks", "rank"),
    [(24, 24, (6, 4), None), (20, 28, 4, None), (12, 12, 3, 2), (30, 20, (2, 5), 2)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_projection_is_optimal(out, columns, nblocks, rank, dtype):
    torch.manual_seed(1)
    M = torch.randn(out, columns, dtype=dtype)
    w1, w2 = monarch_project(M, nblocks, rank)
    k, blocks = len(w1), len(w2)
    near = dense(w1, w2)
    error = (M - near).norm()
    assert abs(torch.vdot((M - near).flatten(), near.flatten())) < 1e-10, "not orthogonal"
    assert_near(dense(*monarch_project(near, nblocks, rank)), near, 1e-10)
    assert_near(dense(*monarch_project(-3 * M, nblocks, rank)), -3 * near, 1e-10)
    # The singular values that find no room, block by block.
    tiles = M.view(out // blocks, blocks, k, columns // k).permute(1, 2, 0, 3)
    values = torch.linalg.svdvals(tiles)
    f = torch.arange(k * w1.shape[1])
    ranks = torch.zeros(blocks, k, dtype=torch.int64)
    ranks.index_put_((f % blocks, f // w1.shape[1]), torch.ones_like(f), accumulate=True)
    left_out = values * (torch.arange(values.shape[-1]) >= ranks[..., None])
    assert error.item() == pytest.approx(left_out.norm().item(), rel=1e-10)
    for scale in (1e-3, 1e-2, 0.1):
        moved = [w + scale * torch.randn_like(w) for w in (w1, w2)]
        assert (M - dense(*moved)).norm() > error


def test_random_matrices_compress_badly():
    """Relative errors on Gaussian matrices, as the spec states them for n = 16, 24, 36."""
    torch.manual_seed(0)
    for n, nblocks, expected in ((16, 4, 0.616), (24, (6, 4), 0.675), (36, 6, 0.735)):
        errors = []
        for _ in range(10):
            M = torch.randn(n, n, dtype=torch.float64)
            errors.append(((M - dense(*monarch_project(M, nblocks))).norm() / M.norm()).item())
        assert np.mean(errors) == pytest.approx(expected, rel=0.05)  # one draw in the spec


def test_half_precision_is_projected_in_float32():
    torch.manual_seed(0)
    M = torch.randn(16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        w1, w2 = monarch_project(M, 4)
    assert w1.dtype is w2.dtype is torch.bfloat16
    expected = monarch_project(M.float(), 4)
    assert torch.equal(w1, expected[0].bfloat16())
    assert torch.equal(w2, expected[1].bfloat16())


def test_autocast_applies():
    given = inputs("up", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = monarch(*given)
    assert y.dtype is torch.bfloat16
    assert_close("y", y, monarch(*given), TOLERANCE[torch.bfloat16])


@each_shape
def test_flops_and_what_is_kept(shape):
    x, w1, w2 = (t.requires_grad_() for t in inputs(shape))
    with FlopCounterMode(display=False) as counter:
        monarch(x, w1, w2)
    assert counter.get_total_flops() == monarch_flops(6, tuple(w1.shape), tuple(w2.shape))
    middle = 6 * w1.shape[0] * w1.shape[1] * x.itemsize
    kept = bytes_kept_for_backward(lambda: monarch(x, w1, w2))
    assert kept == x.nbytes + w1.nbytes + w2.nbytes + middle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(2, 15)}, r"x has shape \(2, 15\); expected \(..., 16\)"),
        ({"w1": torch.rand(4, 16)}, r"w1 has shape \(4, 16\); expected \(k, q, p\)"),
        ({"w2": torch.rand(4, 4, 5)}, r"gives k q = 16 numbers.* takes l r = 20"),
    ],
)
def test_bad_products(change, message):
    good = {"x": torch.rand(2, 16), "w1": torch.rand(4, 4, 4), "w2": torch.rand(4, 4, 4)}
    with pytest.raises(ValueError, match=message):
        monarch(**{**good, **change})


@pytest.mark.parametrize(
    ("shape", "nblocks", "rank", "message"),
    [
        ((16, 16), 3, None, r"nblocks=3 for M of shape \(16, 16\); expected k that divides 16"),
        ((16, 16), 0, None, "nblocks=0"),
        ((16, 16), 8, None, r"blocks rank 0.25; expected 1 to 2"),
        ((16, 16), 4, 5, r"rank=5.*expected 1 to 4"),
        ((20, 10), (2, 4), None, r"k q = 10 middle numbers, no multiple of l = 4"),
        ((4, 4, 4), 2, None, r"expected \(out, in\)"),
    ],
)
def test_bad_projections(shape, nblocks, rank, message):
    with pytest.raises(ValueError, match=message):
        monarch_project(torch.rand(shape), nblocks, rank)
