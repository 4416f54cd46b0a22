"""The selective scan's Triton kernels against the float64 loop, and mutants of them.

B batch, D channels, L time, N state, G groups.
"""

import pytest
import torch

from kernels import selective_scan
from tests.kernels.compare import assert_forms_agree, check_operator, documents
from tests.kernels.guard import mutate

MODULE = "kernels.selective_scan.triton"
STEPS = 16  # of a tile in these tests; the interpreter scans them one by one
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def check(
    L, kind=None, *, D=24, N=5, G=2, without=(), softplus=True, dtype=torch.float32, **scales
):
    """y, the last state and the gradients of all arguments."""
    torch.manual_seed(L)
    B = 1 if kind is None else 2
    shapes = {
        "u": (B, D, L), "delta": (B, D, L), "A": (D, N), "B": (B, G, N, L), "C": (B, G, N, L),
        "D": (D,), "z": (B, D, L), "delta_bias": (D,), "initial_state": (B, D, N),
    }  # fmt: skip
    names = [name for name in shapes if name not in without]
    given = {n: torch.randn(*shapes[n], dtype=torch.float64) * scales.get(n, 1) for n in names}
    given["A"] = -given["A"].abs()
    if not softplus:
        given["delta"] = given["delta"].abs()
        given.pop("delta_bias", None)
    segments = documents(B, L, kind)

    def form(backend, *x):
        arguments = dict(zip(given, x, strict=True))
        y, last = selective_scan(
            **arguments, delta_softplus=softplus, return_last_state=True, segments=segments,
            backend=backend,
        )  # fmt: skip
        return y.transpose(1, 2), last

    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, list(given.values()), dtype, valid, "triton")


@pytest.mark.parametrize("L", [1, 13, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 5])
def test_lengths(L):
    check(L, N=2)


@pytest.mark.parametrize("L", [1, STEPS + 1, 2 * STEPS + 5])
def test_documents(L):
    check(L, "padded", N=2)


@pytest.mark.parametrize(("D", "G", "N"), [(24, 1, 9), (20, 1, 1), (60, 3, 4)])
def test_widths(D, G, N):
    check(STEPS + 3, D=D, G=G, N=N)


@pytest.mark.parametrize("name", OPTIONAL)
def test_without(name):
    check(7, without=(name,))


def test_without_softplus():
    check(7, softplus=False)


def test_in_bfloat16():
    check(19, "packed", N=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("scales", [{"delta": 30.0}, {"A": 1e-4}, {"A": 100.0}], ids=str)
def test_extreme_gates(scales):
    """Steps from 1e-13 to 30 and more; states that never decay, and that decay at once."""
    check(STEPS + 3, N=2, **scales)


def test_operator_keeps_torchs_rules():
    torch.manual_seed(0)
    shapes = ((1, 4, 5), (1, 4, 5), (4, 2), (1, 1, 2, 5), (1, 1, 2, 5), (4,), (1, 4, 5), (4,))
    leaves = [torch.rand(*s).requires_grad_() for s in shapes]
    arguments = (*leaves, True, torch.rand(1, 4, 2).requires_grad_(), None, True, "triton")
    check_operator(torch.ops.seqmix.selective_scan, arguments)


MUTANTS = {
    "a state goes on into the next document": ("restart = flag == 1", "restart = flag == 3"),
    "no bound on the channels": ("(inside < WIDTH)[:, None]\n    numbers = tl.arange(0, BN)[None]",
                                 "(inside < BD)[:, None]\n    numbers = tl.arange(0, BN)[None]"),
    "B of the first group": ("out = tl.zeros((BD, S), tl.float32)\n        for n in range(N):\n"
                             "            place = shared + n * L + time",
                             "out = tl.zeros((BD, S), tl.float32)\n        for n in range(N):\n"
                             "            place = batch * G * N * L + n * L + time"),
    "padding takes a step": ("step = tl.where(flag == 2, 0, step)", "step = step * 1"),
    "the adjoint's rates one early": ("batch * L, time + 1, real", "batch * L, time, real"),
    "states by another stride": ("kept = ((i * batches + batch) * N + numbers) * CHANNELS",
                                 "kept = ((i * batches + batch) * N + numbers) * N"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    monkeypatch.setattr(mutate(monkeypatch, tmp_path, MODULE, *mutant), "STEPS", STEPS)
    with pytest.raises(AssertionError):
        check(STEPS + 3, "padded", N=2, G=2)
