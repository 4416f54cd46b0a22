"""The selective scan: golden arrays, the loop, gradients, documents, memory, cost.

B batch, D channels, L time, N state, G groups.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from kernels import BackendError, selective_scan
from kernels.selective_scan import selective_scan_flops, tiles
from kernels.selective_scan.tiles import STEPS
from tests.kernels.compare import CPP, assert_repeats_with_any_number_of_threads, needs_compiler

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba_selective_scan.npz"
FORMS = ("torch", CPP)
BACKENDS = ("reference", *FORMS)
LENGTHS = (1, 2, 13, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 3)
EXACT = 1e-12  # relative to the largest value: float64, sums of up to a hundred terms


def arguments(
    length: int, batch=2, channels=6, d_state=4, groups=1, dtype=torch.float64, **given: Any
) -> dict[str, Any]:
    """Every argument, random, as leaves that take gradients."""
    generator = torch.Generator().manual_seed(100 * length + groups)

    def leaf(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    made = {
        "u": leaf(batch, channels, length),
        "delta": leaf(batch, channels, length),
        "A": (-2 * leaf(channels, d_state).detach().abs()).requires_grad_(),
        "B": leaf(batch, groups, d_state, length),
        "C": leaf(batch, groups, d_state, length),
        "D": leaf(channels),
        "z": leaf(batch, channels, length),
        "delta_bias": leaf(channels),
        "initial_state": leaf(batch, channels, d_state),
    }
    return made | {"delta_softplus": True} | given


def run(backend: str, args: dict[str, Any]) -> list[torch.Tensor]:
    """y, the last state, and the gradients of a fixed scalar of both, in order of `args`."""
    y, last = selective_scan(**args, return_last_state=True, backend=backend)
    return [y, last, *gradients(args, y, last)]


def gradients(args: dict[str, Any], *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a fixed random scalar of `outputs`, with respect to every leaf of `args`, in order."""
    generator = torch.Generator().manual_seed(7)
    weights = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs
    ]
    leaves = [t for t in args.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.autograd.grad(outputs, leaves, weights)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """No element further off than tolerance * max |expected|."""
    assert got.isfinite().all()
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"off by {error:.1e} of the maximum, allowed {tolerance:.1e}"


def random_segments(B: int, L: int, seed: int) -> torch.Tensor:
    """Documents numbered with gaps, a quarter of the positions padding."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 4, (B, L), generator=generator).sort(1).values * 2
    return torch.where(torch.rand(B, L, generator=generator) < 0.25, -1, numbers)


@pytest.mark.golden("mamba_selective_scan", mixers=["mamba"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    # The arrays are float64 results; float32 has 6e-8 per operation, and gradients are longer sums.
    ("dtype", "forward", "backward"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
    ids=["fp64", "fp32"],
)
def test_golden(backend, dtype, forward, backward):
    data = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    args = {name: data[name].to(dtype).requires_grad_() for name in names}
    y, last = selective_scan(**args, delta_softplus=True, return_last_state=True, backend=backend)
    assert_near(y, data["out"], forward)
    assert_near(last, data["last_state"], forward)
    grads = torch.autograd.grad(y, list(args.values()), data["cot_out"].to(dtype))
    for name, grad in zip(names, grads, strict=True):
        assert_near(grad, data[f"grad_{name}"], backward)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("L", LENGTHS)
def test_forms_equal_the_loop(L, segmented, backend):
    args = arguments(L, groups=3, segments=random_segments(2, L, L) if segmented else None)
    for got, expected in zip(run(backend, args), run("reference", args), strict=True):
        assert_near(got, expected, EXACT)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("given", [{}, {"D": None}, {"z": None, "delta_bias": None}])
@pytest.mark.parametrize("softplus_", [False, True])
def test_optional_arguments(given, softplus_, backend):
    args = arguments(9, delta_softplus=softplus_, initial_state=None, **given)
    if not softplus_:
        args["delta"] = args["delta"].detach().abs().requires_grad_()
    got, expected = run(backend, args), run("reference", args)
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b, EXACT)


def test_blocks_of_rows_and_channels_equal_the_loop(monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS", 8)  # two channels, one row
    args = arguments(5, batch=3, groups=2, segments=random_segments(3, 5, 0))
    for got, expected in zip(run("torch", args), run("reference", args), strict=True):
        assert_near(got, expected, EXACT)


@pytest.mark.parametrize("layout", ["time last", "time first", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@needs_compiler
def test_cpp_at_widths_around_its_vectors(dtype, layout):
    """Channels and states that fill vectors and units of 64 channels, and that do not."""
    for channels, d_state, groups, L in ((16, 16, 1, 33), (66, 9, 1, 17), (134, 17, 2, 70)):
        args = arguments(L, channels=channels, d_state=d_state, groups=groups, dtype=dtype)
        if layout == "time first":
            args |= {n: args[n].detach().mT.contiguous().mT for n in ("u", "delta", "B", "C", "z")}
        if layout == "broadcast":
            args["z"] = args["z"].detach()[:, :1].expand(-1, channels, -1)
        exact = {
            n: t.detach().double().requires_grad_(t.requires_grad)
            if isinstance(t, torch.Tensor)
            else t
            for n, t in args.items()
        }
        # float32: rounding, in sums of up to 70 terms in the gradients of A and D.
        tolerance = EXACT if dtype is torch.float64 else 1e-5
        for got, expected in zip(run("cpp", args), run("reference", exact), strict=True):
            assert_near(got, expected, tolerance)


@needs_compiler
def test_cpp_repeats_to_the_bit_with_any_number_of_threads():
    args = arguments(40, batch=3, channels=130, dtype=torch.float32)
    assert_repeats_with_any_number_of_threads(lambda: run("cpp", args))


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cpp_does_not_hide_what_is_not_finite(bad):
    args = arguments(40, dtype=torch.float32)
    args["u"] = args["u"].detach().clone()
    args["u"][0, 1, 20] = bad
    with torch.no_grad():
        got = selective_scan(**args, backend="cpp").isfinite()
        expected = selective_scan(**args, backend="reference").isfinite()
    assert torch.equal(got, expected)
    assert not got.all()


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("L", [1, 5])
def test_gradcheck(L, backend):
    segments = torch.tensor([[0] * L, [-1, 2, 2, 3, -1][:L]])
    args = arguments(L, channels=4, d_state=2, groups=2, segments=segments)
    names = [
        name for name, t in args.items() if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]

    def call(*tensors: torch.Tensor):
        given = args | dict(zip(names, tensors, strict=True))
        return selective_scan(**given, return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(call, [args[name] for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, STEPS - 1, STEPS, 40])
def test_split_and_continue(cut, backend):
    """Values, and gradients through the state between the pieces."""
    args = arguments(45)
    whole = run(backend, args)
    pieces, state = [], args["initial_state"]
    for part in (slice(None, cut), slice(cut, None)):
        in_time = {name: args[name][..., part] for name in ("u", "delta", "B", "C", "z")}
        y, state = selective_scan(
            **(args | in_time | {"initial_state": state}), return_last_state=True, backend=backend
        )
        pieces.append(y)
    joined = (torch.cat(pieces, 2), state)
    for got, expected in zip([*joined, *gradients(args, *joined)], whole, strict=True):
        assert_near(got, expected, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_is_not_read(backend):
    args = arguments(40)
    y = selective_scan(**args, backend=backend)
    grads = torch.autograd.grad(y[..., 17].sum(), [args[n] for n in ("u", "delta", "B", "C", "z")])
    for grad in grads:
        assert not grad[..., 18:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_are_apart_and_padding_is_not_there(backend):
    """Rows of two documents with padding equal each document alone; the first has the past."""
    args = arguments(9, batch=1)
    segments = torch.tensor([[-1, 3, 3, -1, 3, 5, 5, -1, -1]])
    y, last = selective_scan(**args, segments=segments, return_last_state=True, backend=backend)
    for number, past in ((3, args["initial_state"]), (5, None)):
        at = (segments[0] == number).nonzero().squeeze(1)
        in_time = {name: args[name][..., at] for name in ("u", "delta", "B", "C", "z")}
        alone = args | in_time | {"initial_state": past}
        expected, end = selective_scan(**alone, return_last_state=True, backend=backend)
        assert_near(y[..., at], expected, EXACT)
    assert_near(last, end, EXACT)
    nothing = torch.full_like(segments, -1)
    _, last = selective_scan(**args, segments=nothing, return_last_state=True, backend=backend)
    assert torch.equal(last, args["initial_state"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_step_reaches_the_euler_fixed_point(backend):
    """With step d and input 1, h -> d B / (1 - exp(d A)): Euler's B, not the zero-order hold's."""
    step, L = 0.5, 400
    A = torch.tensor([[-1.0, -0.2]], dtype=torch.float64)
    ones = torch.ones(1, 1, L, dtype=torch.float64)
    B = torch.tensor([2.0, 3.0], dtype=torch.float64).view(1, 2, 1).expand(1, 2, L)
    _, h = selective_scan(ones, step * ones, A, B, B, return_last_state=True, backend=backend)
    expected = step * B[0, :, 0] / (1 - torch.exp(step * A[0]))
    # What is left of the start after L steps is exp(-0.2 * 0.5 * 400) = 4e-18.
    torch.testing.assert_close(h[0, 0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_steps_leave_the_state_alone(backend):
    args = arguments(40, delta_softplus=False, delta_bias=None, z=None)
    args["delta"] = torch.zeros_like(args["delta"])
    y, last = selective_scan(**args, return_last_state=True, backend=backend)
    assert torch.equal(last, args["initial_state"])
    read = torch.einsum("bdn,bnl->bdl", last, args["C"][:, 0]) + args["D"][:, None] * args["u"]
    assert_near(y, read, EXACT)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_decays_are_finite(dtype, backend):
    """Steps up to 60 and runs of zero, A from -1e-3 to -16: values, states and gradients."""
    args = arguments(70, channels=3, dtype=torch.float32, delta_bias=None, delta_softplus=False)
    args["A"] = torch.tensor([-16.0, -1.0, -1e-3])[:, None].repeat(1, 4).requires_grad_()
    delta = 6 * torch.rand(2, 3, 70)
    delta[..., 20:24], delta[..., 40] = 0, 60
    args["delta"] = delta
    for name in ("u", "delta", "B", "C", "z"):
        args[name] = args[name].detach().to(dtype).requires_grad_()
    exact = args | {
        name: t.detach().double().requires_grad_()
        for name, t in args.items()
        if isinstance(t, torch.Tensor)
    }
    # float32: rounding only. bfloat16: y and the gradients are rounded to 8 bits at the end.
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for got, expected in zip(run(backend, args), run("reference", exact), strict=True):
        assert_near(got, expected, tolerance)


@pytest.mark.parametrize("backend", FORMS)
def test_bf16_is_near_fp32(backend):
    args = arguments(70, dtype=torch.float32)
    low = {n: args[n].detach().bfloat16().requires_grad_() for n in ("u", "delta", "B", "C", "z")}
    for got, expected in zip(run(backend, args | low), run(backend, args), strict=True):
        assert_near(got, expected, 2e-2)  # inputs of 8 bits


@pytest.mark.parametrize("backend", FORMS)
def test_dtypes_and_layouts_are_kept(backend):
    low = {n: arguments(5)[n].detach().bfloat16() for n in ("u", "delta", "B", "C")}
    A = -torch.rand(6, 4)
    time_first = low["u"].mT.contiguous().mT
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(
            **(low | {"u": time_first}), A=A, return_last_state=True, backend=backend
        )
    assert y.dtype is torch.bfloat16
    assert y.stride() == time_first.stride()
    assert last.dtype is torch.float32
    expected = selective_scan(**low, A=A, backend=backend)
    assert torch.equal(y, expected), "autocast or the layout changed the result"


@torch.no_grad()
def test_one_step_is_the_recurrence_and_repeats_bit_for_bit():
    args = arguments(1, dtype=torch.float32)
    held = args["initial_state"].clone()
    first = selective_scan(**args, return_last_state=True)
    again = selective_scan(**args, return_last_state=True)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(args["initial_state"], held)
    step = softplus(args["delta"][..., 0] + args["delta_bias"])[..., None]
    inputs = step * args["B"][:, 0, None, :, 0] * args["u"]
    assert_near(first[1], torch.exp(step * args["A"]) * held + inputs, 1e-6)  # one rounding


@pytest.mark.parametrize("backend", FORMS)
def test_memory_does_not_grow_with_the_state(backend):
    """Training keeps less than half a state per step; a loop under autograd keeps three."""
    D, N = 64, 16

    def train(L: int):
        args = arguments(L, batch=1, channels=D, d_state=N, dtype=torch.float32)
        return lambda: selective_scan(**args, backend=backend).sum().backward()

    per_step = (peak_bytes(train(1024)) - peak_bytes(train(512))) / 512
    assert per_step < 0.5 * D * N * 4


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("length", [1, 40])
def test_flops(length, backend):
    """The operators are counted by their formulas, forward, backward, and as a single step."""
    args, elements = arguments(length), 2 * length * 6 * 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        selective_scan(**args, backend=backend)
    assert counter.get_total_flops() == selective_scan_flops(2, length, 6, 4) == 7 * elements
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**args, backend=backend)
    assert counter.get_total_flops() == 7 * elements
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 20 * elements


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("length", [1, 5])
def test_operators_are_well_formed(length, backend):
    """Schema, fake form, autograd registration and compilation, by torch's own check."""
    args = arguments(length, channels=3, d_state=2)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = (*(args[n] for n in order), True, args["initial_state"], None)
    torch.library.opcheck(torch.ops.seqmix.selective_scan.default, (*given, True, backend))
    if length == 1:
        held = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
        held[-2] = held[-2].mT.contiguous().mT  # a state of any strides
        torch.library.opcheck(torch.ops.seqmix.selective_scan_step.default, tuple(held))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"u": torch.zeros(2, 6, 0)}, "u has shape .* at least 1"),
        ({"delta": torch.zeros(2, 6, 4)}, r"delta has shape \(2, 6, 4\); expected \(B, D, L\)"),
        ({"A": torch.zeros(5, 4)}, "A has shape"),
        ({"B": torch.zeros(2, 4, 4, 5)}, "4 groups; expected a divisor of D = 6"),
        ({"C": torch.zeros(2, 4, 5)}, "C has shape"),
        ({"initial_state": torch.zeros(2, 4, 6)}, "initial_state has shape"),
        ({"segments": torch.zeros(2, 5)}, "segments is torch.float32"),
        ({"u": torch.zeros(2, 6, 5, dtype=torch.int64)}, "u is torch.int64"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(arguments(5) | wrong))


def test_unknown_backend():
    with pytest.raises(BackendError, match="these can serve the call: auto, cpp, torch, reference"):
        selective_scan(**arguments(5), backend="mamba_ssm")
