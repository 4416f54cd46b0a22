"""The causal convolution's Triton kernels against the float64 loop, and mutants of them.

B batch, T time, D channels, W taps.
"""

import pytest
import torch

from kernels import causal_conv1d
from tests.kernels.compare import assert_forms_agree, check_operator, documents
from tests.kernels.guard import mutate

MODULE = "kernels.causal_conv1d.triton"
TOKENS = 32
B = 2


def check(T, kind=None, *, D=24, W=4, given=4, activation="silu", dtype=torch.float32):
    """y, the state after it, and the gradients of x, weight, bias and state."""
    torch.manual_seed(T)
    shapes = ((B, T, D), (D, W), (D,), (B, W - 1, D))
    inputs = [torch.randn(s, dtype=torch.float64) for s in shapes[:given]]
    segments = documents(B, T, kind)

    def form(backend, x, weight, bias=None, state=None):
        return causal_conv1d(
            x, weight, bias, activation=activation, initial_state=state, return_state=True,
            segments=segments, backend=backend,
        )  # fmt: skip

    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, inputs, dtype, valid, "triton")


@pytest.mark.parametrize("kind", [None, "packed", "padded"])
@pytest.mark.parametrize("T", [1, 29, TOKENS - 1, TOKENS, TOKENS + 1, 2 * TOKENS + 5])
def test_lengths(T, kind):
    check(T, kind)


@pytest.mark.parametrize("D", [20, 48, 60, 96])
def test_widths(D):
    check(TOKENS + 3, "packed", D=D)


@pytest.mark.parametrize("W", [1, 2, 9])
def test_taps(W):
    check(TOKENS + 3, "padded", W=W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("given", "activation"), [(2, None), (3, "silu"), (4, None)])
def test_options(given, activation, dtype):
    check(19, "padded", given=given, activation=activation, dtype=dtype)


def test_operator_keeps_torchs_rules():
    torch.manual_seed(0)
    leaves = [torch.randn(s).requires_grad_() for s in ((2, 5, 4), (4, 3), (4,), (2, 2, 4))]
    check_operator(torch.ops.seqmix.causal_conv1d, (*leaves, None, True, "triton"))


MUTANTS = {
    "a document sees the one before": ("visible = tl.load(reach + batch * T + t, t < T, 0) >= j",
                                       "visible = tl.load(reach + batch * T + t, t < T, 0) >= 0"),
    "no bound on the channels": ("mask = (t < T)[:, None] & (at < D)[None]\n    share",
                                 "mask = (t < T)[:, None] & (at < BD)[None]\n    share"),
    "no bound on time": ("there = (later >= 0) & (later < T)", "there = later >= 0"),
    "taps in the wrong order": ("weight + at * W + W - 1 - j", "weight + at * W + j"),
    "taps by the stride of channels": ("weight + at * W + W", "weight + at + W"),
    "the state one row early": ("row = batch * (W - 1) + W - 1 + before",
                                "row = batch * (W - 1) + W - 2 + before"),
    "the slope without its second term": ("share * (1 + u * (1 - share))", "share"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)
    with pytest.raises(AssertionError):
        check(TOKENS + 3, "packed")
