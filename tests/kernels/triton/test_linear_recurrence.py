"""The linear recurrence in Triton against the float64 loop, real and complex, and mutants."""

import pytest
import torch

from kernels.linear_recurrence import linear_recurrence
from tests.kernels.compare import assert_forms_agree
from tests.kernels.guard import mutate
from tests.kernels.test_linear_recurrence import run_pairs

MODULE = "kernels.linear_recurrence.triton"
STEPS = 32


def check(T, D=20, *, pairs=True, shrink=0.1):
    """Every state, and the gradients of a, b and h0; |a| is a random number to the power shrink."""
    torch.manual_seed(T)
    a, b, h0 = (torch.randn(*s, D, 2, dtype=torch.float64) for s in ((2, T), (2, T), (2,)))
    a = a / a.norm(dim=-1, keepdim=True) * torch.rand(2, T, D, 1).double() ** shrink

    def plain(backend, *x):
        return (linear_recurrence(*x, backend=backend),)

    given = [a, b, h0] if pairs else [a[..., 0], b[..., 0], h0[..., 0]]
    assert_forms_agree(run_pairs if pairs else plain, given, torch.float32, backend="triton")


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("T", [1, 29, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 5])
def test_lengths(T, pairs):
    check(T, pairs=pairs)


@pytest.mark.parametrize("D", [24, 70])
def test_widths(D):
    check(9, D)


@pytest.mark.parametrize("shrink", [1e-4, 50.0])
def test_extreme_rates(shrink):
    """Nothing is forgotten, or all at once."""
    check(STEPS + 5, shrink=shrink)


MUTANTS = {
    "no bound on time": ("(first + steps < T) & (at < D)", "(first + steps < T + 1) & (at < D)"),
    "no carried state": ("return a * carry - ai * carry_i + b,", "return b,"),
    "rates are not conjugated": ("scan(a_c, -ai_c, y_c", "scan(a_c, ai_c, y_c"),
    "the first state's gradient": ("h_c += tl.where(time == 0, past, 0)", "h_c += 0 * past"),
    "imaginary parts beside real ones": ("2 * place + 1, mask, 0)", "2 * place, mask, 0)"),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)
    with pytest.raises(AssertionError):
        check(STEPS + 5)
