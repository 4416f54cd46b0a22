"""What "auto" takes for a few tokens: the reference's values and gradients, and its FLOPs count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import OURS, REFERENCE, Contender
from benchmarks.operators import OPERATORS
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
