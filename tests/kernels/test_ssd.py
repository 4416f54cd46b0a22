"""SSD: golden arrays, the loop, gradients, extreme decays, documents, groups, memory, cost.

B batch, L time, H heads, P width per head, N state, G groups.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from kernels import BackendError, ssd
from kernels.ssd import chunked, spans, ssd_flops
from kernels.ssd.flops import ssd_backward_flops
from kernels.ssd.op import ssd_torch
from kernels.ssd.reference import ssd_reference
from tests.kernels.compare import CPP, assert_repeats_with_any_number_of_threads, needs_compiler

GOLDEN = Path(__file__).parents[1] / "golden"
BACKENDS = ("reference", "torch", CPP)
CHUNKED = pytest.mark.parametrize("backend", ["torch", CPP])
ssd_cpp = pytest.param(partial(ssd_torch, form="cpp"), marks=needs_compiler, id="cpp")
CHUNK = 8
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 23, 4 * CHUNK)
EXACT = 1e-12  # relative to the largest value: float64, sums of up to a hundred terms
# The arrays are float64 results; float32 has 6e-8 per operation, and gradients are longer sums.
GOLDEN_TOLERANCES = pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
    ids=["fp64", "fp32"],
)


def arguments(
    length: int, batch=2, heads=4, width=3, d_state=5, groups=1, dtype=torch.float64, **given: Any
) -> dict[str, Any]:
    """Every argument, random, as leaves that take gradients."""
    generator = torch.Generator().manual_seed(100 * length + groups)

    def leaf(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    made = {
        "x": leaf(batch, length, heads, width),
        "dt": leaf(batch, length, heads),
        "A": (-2 * leaf(heads).detach().abs()).requires_grad_(),
        "B": leaf(batch, length, groups, d_state),
        "C": leaf(batch, length, groups, d_state),
        "D": leaf(heads),
        "z": leaf(batch, length, heads, width),
        "dt_bias": leaf(heads),
        "initial_states": leaf(batch, heads, width, d_state),
    }
    return made | {"dt_softplus": True, "chunk_size": CHUNK} | given


def run(backend: str, args: dict[str, Any]) -> list[torch.Tensor]:
    """y, the final states, and the gradients of a fixed scalar of both, in order of `args`."""
    y, last = ssd(**args, return_final_states=True, backend=backend)
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


def random_segments(batch: int, length: int, seed: int) -> torch.Tensor:
    """Documents numbered with gaps, a quarter of the positions padding."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 4, (batch, length), generator=generator).sort(1).values * 2
    return torch.where(torch.rand(batch, length, generator=generator) < 0.25, -1, numbers)


@pytest.mark.golden("mamba_ssd_minimal", mixers=["mamba2"])
@GOLDEN_TOLERANCES
@pytest.mark.parametrize("chunk", [1, 8, 7, 64])
@pytest.mark.parametrize("form", [ssd_reference, ssd_torch, ssd_cpp])
def test_golden_minimal(form, chunk, dtype, forward, backward):
    data = {
        name: torch.from_numpy(array)
        for name, array in np.load(GOLDEN / "mamba_ssd_minimal.npz").items()
    }
    names = ("X", "A", "B", "C", "initial_state")
    X, dA, B, C, state = leaves = [data[name].to(dtype).requires_grad_() for name in names]
    y, last = form(X, torch.ones_like(dA), dA, B, C, None, None, state, None, chunk)
    assert_near(y, data["Y"], forward)
    assert_near(last, data["final_state"], forward)
    cotangents = [data[name].to(dtype) for name in ("cot_Y", "cot_final")]
    grads = torch.autograd.grad((y, last), leaves, cotangents)
    for name, grad in zip(names, grads, strict=True):
        assert_near(grad, data[f"grad_{name}"], backward)


@pytest.mark.golden("mamba_ssd_stress", mixers=["mamba2"])
@GOLDEN_TOLERANCES
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 96])
@pytest.mark.parametrize("form", [ssd_reference, ssd_torch, ssd_cpp])
def test_golden_stress(form, chunk, dtype, forward, backward):
    data = {
        name: torch.from_numpy(array)
        for name, array in np.load(GOLDEN / "mamba_ssd_stress.npz").items()
    }
    x, dt, A = (data[name].to(dtype) for name in ("x", "dt", "A"))
    leaves = [x * dt[..., None], dt * A, data["B"].to(dtype), data["C"].to(dtype)]
    X, dA, B, C = leaves = [t.requires_grad_() for t in leaves]
    y, last = form(X, torch.ones_like(dA), dA, B, C, None, None, None, None, chunk)
    assert_near(y, data["y"], forward)
    assert_near(last, data["final_state"], forward)
    grads = torch.autograd.grad(y, leaves, data["cot_y"].to(dtype))
    for name, grad in zip(("X", "dA", "B", "C"), grads, strict=True):
        assert_near(grad, data[f"grad_{name}"], backward)


@pytest.mark.golden("mamba_ssd_stress", mixers=["mamba2"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stress_through_the_public_function(dtype, backend):
    """The same array from x, dt and A themselves, in bfloat16 too; every gradient is finite."""
    data = {
        name: torch.from_numpy(array)
        for name, array in np.load(GOLDEN / "mamba_ssd_stress.npz").items()
    }
    args = {name: data[name].to(dtype).requires_grad_() for name in ("x", "B", "C")}
    args |= {"dt": data["dt"].clone().requires_grad_(), "A": data["A"].clone().requires_grad_()}
    y, last = ssd(**args, return_final_states=True, backend=backend)
    # float64 multiplies dt and A, which the array's own dA is rounded from, in float64 too;
    # bfloat16 rounds the inputs to 8 bits.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_near(y, data["y"], tolerance)
    assert_near(last, data["final_state"], tolerance)
    grads = torch.autograd.grad(y, list(args.values()), data["cot_y"].to(dtype))
    assert all(grad.isfinite().all() for grad in grads)
    assert_near(grads[1], data["grad_B"], max(tolerance, 1e-9))


@CHUNKED
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("L", LENGTHS)
def test_chunks_equal_the_loop(L, segmented, backend):
    args = arguments(L, groups=2, segments=random_segments(2, L, L) if segmented else None)
    for got, expected in zip(run(backend, args), run("reference", args), strict=True):
        assert_near(got, expected, EXACT)


@CHUNKED
@pytest.mark.parametrize("chunk", [1, 7, 16, 37, 100])
def test_chunk_size_changes_rounding_only(chunk, backend):
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, 1e-5)):
        segments = random_segments(2, 37, 3)
        args = arguments(37, groups=4, dtype=dtype, segments=segments, chunk_size=chunk)
        for got, expected in zip(run(backend, args), run("reference", args), strict=True):
            assert_near(got, expected, tolerance)


@pytest.mark.parametrize("L", [24, 29])
def test_spans_of_chunks_equal_the_loop(L, monkeypatch):
    monkeypatch.setattr(spans, "SQUARE_BYTES", 2 * 4 * CHUNK * CHUNK * 8 * 2)  # two chunks
    args = arguments(L, segments=random_segments(2, L, 0))
    for got, expected in zip(run("torch", args), run("reference", args), strict=True):
        assert_near(got, expected, EXACT)


@CHUNKED
@pytest.mark.parametrize(
    "given",
    [
        {"D": None},
        {"D": torch.randn(4, 3, dtype=torch.float64, requires_grad=True)},
        {"z": None, "dt_bias": None},
        {"dt_limit": (0.3, 1.0)},
        {"initial_states": None, "dt_limit": (0.3, 1.0), "segments": random_segments(2, 19, 4)},
    ],
    ids=["no D", "wide D", "no gate", "limits", "limits with padding"],
)
def test_optional_arguments(given, backend):
    args = arguments(19, **given)
    for got, expected in zip(run(backend, args), run("reference", args), strict=True):
        assert_near(got, expected, EXACT)


@CHUNKED
@pytest.mark.parametrize("L", [1, 5])
def test_gradcheck(L, backend):
    segments = torch.tensor([[0] * L, [-1, 2, 2, 3, -1][:L]])
    args = arguments(L, heads=2, width=2, d_state=2, chunk_size=2, segments=segments)
    names = [
        name for name, t in args.items() if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]

    def call(*tensors: torch.Tensor):
        given = args | dict(zip(names, tensors, strict=True))
        return ssd(**given, return_final_states=True, backend=backend)

    assert torch.autograd.gradcheck(call, [args[name] for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, CHUNK - 1, CHUNK, 20])
def test_split_and_continue(cut, backend):
    """Values, and gradients through the state between the pieces."""
    args = arguments(21)
    whole = run(backend, args)
    pieces, state = [], args["initial_states"]
    for part in (slice(None, cut), slice(cut, None)):
        in_time = {name: args[name][:, part] for name in ("x", "dt", "B", "C", "z")}
        y, state = ssd(
            **(args | in_time | {"initial_states": state}),
            return_final_states=True,
            backend=backend,
        )
        pieces.append(y)
    joined = (torch.cat(pieces, 1), state)
    for got, expected in zip([*joined, *gradients(args, *joined)], whole, strict=True):
        assert_near(got, expected, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_is_not_read(backend):
    args = arguments(20)
    y = ssd(**args, backend=backend)
    for grad in torch.autograd.grad(y[:, 9].sum(), [args[n] for n in ("x", "dt", "B", "C", "z")]):
        assert not grad[:, 10:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_are_apart_and_padding_is_not_there(backend):
    """Rows of two documents with padding equal each document alone; the first has the past."""
    args = arguments(9, batch=1, chunk_size=4)
    segments = torch.tensor([[-1, 3, 3, -1, 3, 5, 5, -1, -1]])
    y, last = ssd(**args, segments=segments, return_final_states=True, backend=backend)
    for number, past in ((3, args["initial_states"]), (5, None)):
        at = (segments[0] == number).nonzero().squeeze(1)
        in_time = {name: args[name][:, at] for name in ("x", "dt", "B", "C", "z")}
        alone = args | in_time | {"initial_states": past}
        expected, end = ssd(**alone, return_final_states=True, backend=backend)
        assert_near(y[:, at], expected, EXACT)
    assert_near(last, end, EXACT)
    nothing = torch.full_like(segments, -1)
    _, last = ssd(**args, segments=nothing, return_final_states=True, backend=backend)
    assert torch.equal(last, args["initial_states"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_step_reaches_the_euler_fixed_point(backend):
    """With step d and input 1, S -> d B / (1 - exp(d A)): Euler's B, not the zero-order hold's."""
    step, L = 0.5, 400
    A = torch.tensor([-1.0, -0.2], dtype=torch.float64)
    x = torch.ones(1, L, 2, 1, dtype=torch.float64)
    B = torch.tensor([3.0], dtype=torch.float64).expand(1, L, 1, 1)
    _, S = ssd(x, step * x[..., 0], A, B, B, return_final_states=True, backend=backend)
    # What is left of the start after L steps is exp(-0.2 * 0.5 * 400) = 4e-18.
    expected = 3 * step / (1 - torch.exp(step * A))
    torch.testing.assert_close(S[0, :, 0, 0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_steps_leave_the_state_alone(backend):
    args = arguments(20, dt_softplus=False, dt_bias=None, z=None)
    args["dt"] = torch.zeros_like(args["dt"])
    y, last = ssd(**args, return_final_states=True, backend=backend)
    assert torch.equal(last, args["initial_states"])
    read = torch.einsum("bhpn,bln->blhp", last, args["C"][:, :, 0])
    assert_near(y, read + args["D"][:, None] * args["x"], EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_groups_and_unused_states(backend):
    """Heads are exchangeable, one group is many equal ones, and a state without input is none."""
    args = arguments(13)
    y = ssd(**args, backend=backend)
    order = torch.tensor([2, 0, 3, 1])
    by_head = {"x": 2, "dt": 2, "A": 0, "D": 0, "z": 2, "dt_bias": 0, "initial_states": 1}
    permuted = args | {n: args[n].index_select(dim, order) for n, dim in by_head.items()}
    assert_near(ssd(**permuted, backend=backend), y[:, :, order], EXACT)
    repeated = args | {n: args[n].expand(-1, -1, 4, -1) for n in ("B", "C")}
    assert_near(ssd(**repeated, backend=backend), y, EXACT)
    wider = args | {
        "B": torch.nn.functional.pad(args["B"], (0, 2)),
        "C": torch.nn.functional.pad(args["C"], (0, 2), value=1.0),
        "initial_states": torch.nn.functional.pad(args["initial_states"], (0, 2)),
    }
    assert_near(ssd(**wider, backend=backend), y, EXACT)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "d_state"), [(64, 64), (16, 80), (48, 1), (1, 128), (65, 33)])
def test_cpp_at_widths_around_its_vectors(width, d_state, dtype):
    """Full chunks of 64, blocks of several heads and one of fewer, tokens of any strides."""
    args = arguments(
        150, 1, 10, width, d_state, groups=2, chunk_size=64, segments=random_segments(1, 150, 6)
    )
    low = {n: args[n].detach().to(dtype) for n in ("x", "B", "C", "z")}
    rest = torch.float64 if dtype is torch.float64 else torch.float32
    low |= {
        n: t.detach().to(rest)
        for n, t in args.items()
        if n not in low and isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    for name in ("x", "B", "z"):
        wide = torch.cat([low[name], low[name]], 2)
        low[name] = wide[:, :, : low[name].shape[2]]
    exact = args | {n: t.double().requires_grad_() for n, t in low.items()}
    low = args | {n: t.requires_grad_() for n, t in low.items()}
    tolerance = {torch.float64: EXACT, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for got, expected in zip(run("cpp", low), run("torch", exact), strict=True):
        assert_near(got, expected, tolerance)


@needs_compiler
def test_cpp_repeats_to_the_bit_with_any_number_of_threads():
    args = arguments(200, 3, 8, 32, 32, groups=2, dtype=torch.float32, chunk_size=64)
    assert_repeats_with_any_number_of_threads(lambda: run("cpp", args))


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_cpp_does_not_hide_what_is_not_finite(bad):
    """It reaches all later steps of its head and document, and no other head or row."""
    args = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in arguments(40).items()}
    args["segments"] = torch.tensor([[0] * 30 + [1] * 10, [0] * 40])
    args["x"][0, 13, 1, 2] = bad
    finite = ssd(**args, backend="cpp")[..., 2].isfinite()
    assert not finite[0, 13:30, 1].any()
    assert finite[0][:, [0, 2, 3]].all()
    assert finite[1].all()


@CHUNKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_decays_are_finite(dtype, backend):
    """Steps up to 60 and runs of zero, A from -1e-3 to -16: values, states and gradients."""
    args = arguments(150, heads=3, dt_bias=None, dt_softplus=False, chunk_size=64)
    args["A"] = torch.tensor([-16.0, -1.0, -1e-3], dtype=torch.float64).requires_grad_()
    dt = 6 * torch.rand(2, 150, 3, generator=torch.Generator().manual_seed(0)).double()
    dt[:, 40:44], dt[:, 70], dt[:, 127] = 0, 60, 60
    args["dt"] = dt
    low = {
        name: t.detach().to(dtype if name in ("x", "dt", "B", "C", "z") else torch.float32)
        for name, t in args.items()
        if isinstance(t, torch.Tensor)
    }
    exact = args | {name: t.double().requires_grad_() for name, t in low.items()}
    low = args | {name: t.requires_grad_() for name, t in low.items()}
    # float32: rounding only. bfloat16: y and the gradients are rounded to 8 bits at the end.
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for got, expected in zip(run(backend, low), run("reference", exact), strict=True):
        assert_near(got, expected, tolerance)


@CHUNKED
def test_bf16_is_near_fp32(backend):
    args = arguments(70, dtype=torch.float32)
    low = {n: args[n].detach().bfloat16().requires_grad_() for n in ("x", "dt", "B", "C", "z")}
    for got, expected in zip(run(backend, args | low), run(backend, args), strict=True):
        assert_near(got, expected, 2e-2)  # inputs of 8 bits


def test_dtypes_and_autocast():
    args = arguments(20, dtype=torch.float32)
    low = args | {n: args[n].detach().bfloat16() for n in ("x", "dt", "B", "C", "z")}
    expected, _ = ssd(**low, return_final_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = ssd(**low, return_final_states=True)
    assert y.dtype is torch.bfloat16
    assert last.dtype is torch.float32
    assert torch.equal(y, expected), "autocast changed the result"


@torch.no_grad()
def test_one_step_repeats_bit_for_bit():
    args = arguments(1, dtype=torch.float32)
    held = args["initial_states"].clone()
    first, again = (ssd(**args, return_final_states=True) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(args["initial_states"], held)


def test_memory_does_not_grow_with_the_state_or_the_square():
    """Training keeps far less per step than a state, or than a row of the squares of all heads."""
    heads, width, d_state, chunk = 2, 16, 64, 64

    def train(L: int):
        args = arguments(L, 1, heads, width, d_state, dtype=torch.float32, chunk_size=chunk)
        return lambda: ssd(**args).sum().backward()

    long = spans.SQUARE_BYTES // (heads * chunk * 4)  # one full span
    per_step = (peak_bytes(train(2 * long)) - peak_bytes(train(long))) / long
    assert per_step < 0.25 * heads * width * d_state * 4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("L", [1, 5, 8, 21])
def test_flops(L, gated):
    """The operator is counted by its formula, which is what its own products sum up to."""
    shape = {"batch": 2, "heads": 4, "width": 3, "d_state": 5, "groups": 2}
    args = arguments(L, **shape) | ({} if gated else {"z": None})
    sizes = (2, L, 4, 3, 5, 2, CHUNK)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ssd(**args)
    assert counter.get_total_flops() == ssd_flops(*sizes)
    y = ssd(**args)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == ssd_backward_flops(*sizes, gated=gated)

    steps = args["dt"].detach()
    given = (steps, -steps.abs(), args["B"], args["C"], args["D"], args["z"], None, None, CHUNK)
    call = spans.Arguments(args["x"], *given)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y, last, kept = chunked.forward(call, keep_states=True)
    assert L == 1 or counter.get_total_flops() == ssd_flops(*sizes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chunked.backward(call, kept, y, last)
    assert counter.get_total_flops() == ssd_backward_flops(*sizes, gated=gated)


@pytest.mark.parametrize("length", [1, 5])
def test_operators_are_well_formed(length):
    """Schema, fake form, autograd registration and compilation, by torch's own check."""
    args = arguments(length, heads=2, groups=2)
    args["decay"] = (-args["dt"].detach().abs()).requires_grad_()
    given = [args[n] for n in ("x", "dt", "decay", "B", "C", "D", "z", "initial_states")]
    torch.library.opcheck(torch.ops.seqmix.ssd.default, (*given, None, 2, True))
    if length == 1:
        held = [t.detach() for t in given]
        held[-1] = held[-1].mT.contiguous().mT  # a state of any strides
        torch.library.opcheck(torch.ops.seqmix.ssd_step.default, tuple(held))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(2, 0, 4, 3)}, "x has shape .* at least 1"),
        ({"dt": torch.zeros(2, 5)}, r"dt has shape \(2, 5\); expected \(B, L, H\)"),
        ({"A": torch.zeros(3)}, "A has shape"),
        ({n: torch.zeros(2, 5, 3, 5) for n in "BC"}, "3 groups; expected a divisor of H = 4"),
        ({"C": torch.zeros(2, 5, 1, 4)}, "C has shape"),
        ({"chunk_size": 0}, "chunk_size=0; expected at least 1"),
        ({"D": torch.zeros(4, 5)}, "D has shape"),
        ({"segments": torch.zeros(2, 5)}, "segments is torch.float32"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        ssd(**(arguments(5) | wrong))


def test_unknown_backend():
    with pytest.raises(BackendError, match="these can serve the call: auto, cpp, torch, reference"):
        ssd(**arguments(5), backend="mamba_ssm")
