"""SSD's Triton kernels against the float64 loop, and mutants of them.

B batch, L time, H heads, G groups, P width per head, N state.
"""

from importlib import import_module

import pytest
import torch

from kernels import ssd
from tests.kernels.compare import assert_forms_agree, check_operator, documents
from tests.kernels.guard import mutate

MODULE = "kernels.ssd.triton"
CHUNK = 64


def check(
    L, kind=None, *, B=1, H=2, G=1, P=20, N=24, without=(), dtype=torch.float32, wide_D=False,
    **scales,
):  # fmt: skip
    """y, the last states and the gradients of all arguments; `scales` stretch some of them."""
    torch.manual_seed(L)
    shapes = {
        "x": (B, L, H, P), "dt": (B, L, H), "A": (H,), "B": (B, L, G, N), "C": (B, L, G, N),
        "D": (H, P) if wide_D else (H,), "z": (B, L, H, P), "dt_bias": (H,),
        "initial_states": (B, H, P, N),
    }  # fmt: skip
    names = [name for name in shapes if name not in without]
    given = {n: torch.randn(*shapes[n], dtype=torch.float64) * scales.get(n, 1) for n in names}
    given["A"] = -given["A"].abs()
    segments = documents(B, L, kind)

    def form(backend, *x):
        options = {"dt_softplus": True, "segments": segments, "return_final_states": True}
        return ssd(**dict(zip(given, x, strict=True)), **options, backend=backend)

    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, list(given.values()), dtype, valid, "triton")


@pytest.mark.parametrize("L", [1, 37, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_lengths(L):
    check(L)


@pytest.mark.parametrize("L", [1, 37, 2 * CHUNK + 5])
def test_padded(L):
    check(L, "padded", B=2)


@pytest.mark.parametrize(("P", "N"), [(24, 96), (60, 48), (96, 16)])
def test_widths(P, N):
    check(CHUNK + 3, "packed", P=P, N=N)


def test_groups():
    check(CHUNK + 3, "packed", H=4, G=2, wide_D=True)


@pytest.mark.parametrize("names", [("D", "z"), ("dt_bias", "initial_states")], ids=str)
def test_without(names):
    check(19, "packed", without=names)


def test_in_bfloat16():
    check(CHUNK + 3, "padded", dtype=torch.bfloat16)


@pytest.mark.parametrize("scales", [{"dt": 30.0}, {"A": 1e-4}, {"A": 1e3}], ids=str)
def test_extreme_gates(scales):
    """Steps from 1e-13 to 30 and more; states that never decay, and that decay at once."""
    check(CHUNK + 3, "packed", **scales)


def test_small_decays_behind_a_large_one():
    """The difference of running sums in float32 would have lost them: 1e5 + 0.01 - 1e5."""
    torch.manual_seed(0)
    x, dt, B, C = (torch.randn(1, 40, 1, *w, dtype=torch.float64) for w in ((4,), (), (3,), (3,)))
    dt = dt.abs() * 1e-2
    dt[:, 7] = 1e5

    def form(backend, *given):
        return ssd(*given, return_final_states=True, backend=backend)

    given = [x, dt, -torch.ones(1, dtype=torch.float64), B, C]
    x[:, 7] = 0  # a step of 1e5 would write nothing but itself
    assert_forms_agree(form, given, torch.float32, backend="triton")


def test_sums_in_one_float32_are_caught(monkeypatch, tmp_path):
    old, new = "low = (sums - high).to(tl.float32)", "low = high * 0"
    mutate(monkeypatch, tmp_path, MODULE, old, new)
    with pytest.raises(AssertionError):
        test_small_decays_behind_a_large_one()


def test_operator_keeps_torchs_rules():
    torch.manual_seed(0)
    shapes = ((1, 5, 2, 4), (1, 5, 2), (1, 5, 2), (1, 5, 1, 3), (1, 5, 1, 3), (2,), (1, 5, 2, 4))
    leaves = [torch.rand(*s) for s in shapes]
    leaves[2] = -leaves[2]
    leaves = [x.requires_grad_() for x in leaves]
    check_operator(torch.ops.seqmix.ssd, (*leaves, None, None, 8, True, "triton"))


def test_chunks_are_those_of_the_kernels():
    assert import_module(MODULE).CHUNK == CHUNK


MUTANTS = {
    "a step reads later ones": (
        "mask = steps[:, None] >= steps[None]", "mask = steps[:, None] >= 0"),
    "a state goes on into the next document": (
        "across = tl.where(began == ended, across, 0)", "across = across * 1"),
    "documents read each other": (
        "mask = mask & (number[:, None] == number[None])", "mask = mask & (number >= -1)[:, None]"),
    "writes past the width": (
        "store_tile(y + of_head, out, steps * H, there, at_p, P)",
        "store_tile(y + of_head, out, steps * H, there, at_p, P + 1)"),
    "B by the stride of heads": (
        "a_c = load_tile(a + (row * G + head // (H // G)) * N, steps * G",
        "a_c = load_tile(a + (row * G + head // (H // G)) * N, steps * H"),
    "decays cross one step too many": (
        "steps[:, None] + 1 == steps[None]", "steps[:, None] == steps[None]"),
    "the state's gradient without its decay": (
        "dB_c += dot(x_c * leaving[:, None], R, DOT)", "dB_c += dot(x_c, R, DOT)"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)
    with pytest.raises(AssertionError):
        check(CHUNK + 3, "packed", dt=3.0)
