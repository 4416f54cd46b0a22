"""What "auto" takes for a few tokens: the reference's values and gradients, and its FLOPs count."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import OURS, REFERENCE, Contender
from benchmarks.operators import OPERATORS
from kernels.dispatch import dispatched
from kernels.linear_attention import linear_attention
from tests.benchmarks.test_bench import SMALL
from tests.kernels.compare import TOLERANCE, assert_close, values_and_gradients

CPU = torch.device("cpu")
# No reference over time; the others' outputs do not depend on it.
ACROSS_TIME = sorted(OPERATORS.keys() - {"linear_cross_entropy", "linear_attention_step"})


def contenders(op: str, length: int) -> dict[str, Contender]:
    torch.manual_seed(length)
    operator = OPERATORS[op]
    return operator.make({**operator.sizes, **SMALL[op]}, length, torch.float64, CPU)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("op", ACROSS_TIME)
def test_auto_is_the_reference(op, length):
    found = contenders(op, length)
    ours, reference = found[OURS], found[REFERENCE]
    got, expected = (
        values_and_gradients(lambda *x, run=c.run: (run(*x),), ours.inputs, torch.float64)
        for c in (ours, reference)
    )
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(f"{op} {i}", a, b, TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "op", ["causal_conv1d", "linear_recurrence", "long_conv", "selective_scan"]
)
def test_a_mode_that_counts_sees_the_operator(op):
    ours = contenders(op, 1)[OURS]
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in ours.inputs]
    with FlopCounterMode(display=False) as counter:
        ours.run(*inputs)
    assert counter.get_total_flops() > 0


def decode(*inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return linear_attention(*inputs)


def test_a_decoding_step_is_seen_by_whoever_looks():
    """Else it goes past torch's dispatcher, with the same result."""
    q, k, v = torch.rand(3, 1, 1, 2, 8)
    assert not dispatched(q, k, v, None)
    expected = decode(q, k, v)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(decode(q, k, v), expected)
    assert counter.get_total_flops() > 0
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        decode(q, k, v)
    assert "seqmix::linear_attention_steps" in {event.key for event in seen.key_averages()}
    assert torch.equal(torch.compile(decode, fullgraph=True)(q, k, v), expected)


def test_what_goes_through_the_dispatcher():
    class Subclass(torch.Tensor):
        pass

    x = torch.rand(3)
    assert dispatched(x, x.as_subclass(Subclass))
    inside = []
    torch.func.vmap(lambda row: inside.append(dispatched(row)) or row)(x)
    assert inside == [True]
    assert not dispatched(torch.nn.Parameter(x), x)
