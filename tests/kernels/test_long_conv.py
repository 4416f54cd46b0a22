"""Long convolution: forms, transforms, histories, documents, gradients, cost.

B batch, T time, P positions before, D channels, K taps.
"""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.long_conv import long_conv, long_conv_flops
from kernels.long_conv.documents import bundles
from kernels.long_conv.transforms import TRANSFORMS
from tests.kernels.compare import (
    TOLERANCE,
    assert_close,
    assert_forms_agree,
    bytes_kept_for_backward,
    check_operator,
    documents,
)

spectral = import_module("kernels.long_conv.spectral")
B, D = 3, 5
each_transform = pytest.mark.parametrize("transform", TRANSFORMS)


@pytest.fixture
def small_slices(monkeypatch):
    """Two channels at a time at most, so that slices have a border and a rest."""
    monkeypatch.setattr(spectral, "_SLICE", {"cpu": 2 * B * 32})


def inputs(T: int, K: int, P: int = 0, dtype=torch.float64) -> list[Tensor]:
    """u, k, D, history."""
    torch.manual_seed(10 * T + K)
    shapes = ((B, T, D), (D, K), (D,), (B, P, D))
    return [torch.randn(s, dtype=dtype) for s in shapes]


def run(u, k, skip=None, history=None, **options):
    """y alone."""
    return long_conv(u, k, skip, history=history, **options)


@each_transform
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [None, "packed", "padded"])
# Up to 8 outputs are summed directly; beyond, K on both sides of T, and histories.
@pytest.mark.parametrize(
    ("T", "K", "P"), [(1, 1, 0), (1, 9, 7), (8, 20, 3), (9, 9, 0), (23, 40, 6)]
)
def test_forms_agree(small_slices, T, K, P, kind, dtype, transform):
    segments = documents(B, T, kind)
    valid = None if segments is None else segments >= 0

    def form(backend, *x):
        y = run(*x, segments=segments, transform=transform, backend=backend)
        return (y if valid is None else y * valid[..., None],)

    assert_forms_agree(form, inputs(T, K, P), dtype, valid)


@each_transform
def test_is_torchs_convolution(transform):
    u, k, *_ = inputs(100, 100)
    padded = torch.nn.functional.pad(u.mT, (99, 0))
    expected = torch.nn.functional.conv1d(padded, k.flip(1)[:, None], groups=D).mT
    # The spec's bound for float64, relative to an RMS of 7.
    assert_close("y", run(u, k, transform=transform), expected, 1e-12)


@each_transform
@pytest.mark.parametrize("length", [1, 2, 7, 16, 33, 100, 257, 1000])
def test_transforms_invert_and_convolve(length, transform):
    chosen = TRANSFORMS[transform]
    n = chosen.padded(2 * length - 1)
    assert 2 * length - 1 <= n <= max(16, 2.6 * length), "padded too short, or wastefully"
    x, y = torch.randn(2, 2, 3, length, dtype=torch.float64)
    spectrum = chosen.spectrum(x, n)
    assert spectrum[0, 0].numel() == chosen.frequencies(n)
    assert_close("inverse", chosen.signal(spectrum, n, length), x, 1e-13)
    got = chosen.signal(spectrum * chosen.spectrum(y, n), n, length)
    wide = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(y, 2 * length)
    assert_close("product", got, torch.fft.irfft(wide, 2 * length)[..., :length], 1e-12)


@pytest.mark.parametrize("kind", [None, "padded"])
def test_gradcheck(kind):
    segments = documents(B, 10, kind)

    def fn(*x):
        y = run(*x, segments=segments)
        return y if segments is None else y[segments >= 0]

    assert torch.autograd.gradcheck(fn, [x.requires_grad_() for x in inputs(10, 7, 2)])


@each_transform
@pytest.mark.parametrize("cut", [1, 8, 9, 39])
def test_split_and_continue(cut, transform):
    u, k, skip, _ = inputs(40, 40)
    whole = run(u, k, skip, transform=transform)
    first = run(u[:, :cut], k, skip, transform=transform)
    second = run(u[:, cut:], k, skip, u[:, :cut], transform=transform)
    assert_close("y", torch.cat([first, second], 1), whole, TOLERANCE[torch.float64])


@each_transform
def test_no_output_sees_a_later_input(transform):
    """float32: what a transform leaves there is rounding, below 1e-6 of the largest gradient."""
    u, k, *_ = inputs(50, 50, dtype=torch.float32)
    u.requires_grad_()
    y = run(u, k, transform=transform)
    for t in (0, 10, 30):
        (grad,) = torch.autograd.grad(y[:, t].sum(), u, retain_graph=True)
        assert grad[:, t + 1 :].abs().max() <= 1e-6 * grad.abs().max()
        assert grad[:, : t + 1].abs().min() > 1e-6 * grad.abs().max()


def test_documents_equal_separate_runs():
    u, k, skip, history = inputs(60, 60, 4)
    segments = documents(B, 60, "padded")
    y = run(u, k, skip, history, segments=segments)
    assert (y[segments < 0] == 0).all()
    for b in range(B):
        past = history[b : b + 1]
        for name in [n for n in segments[b].unique().tolist() if n >= 0]:
            at = segments[b] == name
            alone = run(u[b : b + 1, at], k, skip, past)
            assert_close(f"document {name}", y[b : b + 1, at], alone, TOLERANCE[torch.float64])
            past = None


def test_bundles_hold_every_token_once_and_little_else():
    lengths = torch.tensor([1, 1, 3, 4, 7, 8, 200, 1])
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    segments = torch.stack([row, row.flip(0).neg() + len(lengths) - 1, torch.full_like(row, -1)])
    seen, rows = [], 0
    for index, real in bundles(segments):
        assert real.sum(1).min() * 2 > real.shape[1]
        assert torch.equal(real, real.sort(1, descending=True).values)
        seen.append(index[real])
        rows += real.numel()
    valid = (segments >= 0).flatten().nonzero().squeeze(1)
    assert torch.equal(torch.cat(seen).sort().values, valid)
    assert rows < 2 * len(valid)


def test_rounding_of_the_input_is_all_that_half_precision_costs():
    u, k, skip, _ = inputs(30, 30, dtype=torch.bfloat16)
    y = run(u, k.float(), skip.float())
    assert y.dtype is torch.bfloat16
    expected = run(u.double(), k.double(), skip.double())
    assert_close("y", y, expected, TOLERANCE[torch.bfloat16])


@each_transform
def test_autocast_changes_nothing(transform):
    u, k, skip, _ = inputs(40, 40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(u, k, skip, transform=transform)
    assert torch.equal(inside, run(u, k, skip, transform=transform))


def test_layouts_and_torchs_own_checks():
    u, k, *_ = (x.requires_grad_() for x in inputs(12, 12))
    op = torch.ops.seqmix.long_conv.default
    for segments, past, transform in (
        (None, 0, "fft"),
        (None, 9, "monarch"),
        (documents(B, 12, "padded"), 2, "fft"),
    ):
        check_operator(op, [u, k, segments, past, transform])


def test_backward_keeps_the_inputs_and_the_taps():
    for T in (500, 1000):
        u, k, *_ = (x.requires_grad_() for x in inputs(T, T, dtype=torch.float32))
        assert bytes_kept_for_backward(lambda u=u, k=k: run(u, k)) == u.nbytes + k.nbytes


@each_transform
@pytest.mark.parametrize(("T", "P"), [(1, 0), (1, 20), (8, 0), (9, 0), (40, 9)])
def test_flops(T, P, transform):
    u, k, skip, history = inputs(T, 64, P)
    with FlopCounterMode(display=False) as counter:
        run(u, k, skip, history, transform=transform)
    formula = long_conv_flops(B, T, D, 64, past=P, transform=transform)
    assert counter.get_total_flops() == formula


def test_flops_grow_as_stated():
    """T log T, and T^1.5 for the Monarch transform."""

    def ratio(transform):
        long, short = (long_conv_flops(1, T, 1, T, transform=transform) for T in (4 * 8192, 8192))
        return long / short

    assert ratio("fft") == pytest.approx(4 * 16 / 14, rel=0.02)
    assert ratio("monarch") == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.rand(2, 5)}, r"u has shape \(2, 5\); expected \(B, T, D\)"),
        ({"u": torch.rand(2, 0, 3)}, "must be at least 1"),
        ({"u": torch.rand(2, 5, 3, dtype=torch.complex64)}, "u is torch.complex64"),
        ({"k": torch.rand(4, 5)}, r"k has shape \(4, 5\)"),
        ({"k": torch.rand(3, 0)}, "must be at least 1"),
        ({"D": torch.rand(4)}, r"D has shape \(4,\)"),
        ({"history": torch.rand(2, 5, 4)}, r"history has shape \(2, 5, 4\)"),
        ({"segments": torch.zeros(2, 4, dtype=torch.long)}, r"segments has shape \(2, 4\)"),
        ({"transform": "dct"}, "transform='dct'; allowed: fft, monarch"),
    ],
)
def test_bad_input(change, message):
    good = {"u": torch.rand(2, 5, 3), "k": torch.rand(3, 5)}
    with pytest.raises(ValueError, match=message):
        long_conv(**{**good, **change})
