"""Linear attention's Triton kernels against the float64 loop, and mutants of them.

B batch, T time, H heads, K features, V value width.
"""

import pytest
import torch

from kernels.linear_attention import CHUNK
from tests.kernels.compare import assert_forms_agree, documents
from tests.kernels.guard import mutate
from tests.kernels.test_linear_attention import flat, inputs

MODULE = "kernels.linear_attention.triton"
WIDTHS = [(24, 24), (48, 20), (60, 96), (96, 48)]


def check(T, kind, dtype, *, widths=(24, 20), normalize=True, with_state=True, scale=0.5, B=2, H=2):
    """Outputs, the last state and every gradient."""
    segments = documents(B, T, kind)
    given = inputs(T, B=B, H=H, K=widths[0], V=widths[1])[: 5 if with_state else 3]

    def form(backend, *x):
        options = {"scale": scale, "normalize": normalize, "segments": segments}
        return flat(*x, backend=backend, **options)

    valid = None if segments is None else segments >= 0
    assert_forms_agree(form, given, dtype, valid, "triton")


@pytest.mark.parametrize("kind", [None, "padded"])
@pytest.mark.parametrize("T", [1, 37, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_lengths(T, kind):
    check(T, kind, torch.float32)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_widths(widths):
    check(CHUNK + 3, "packed", torch.float32, widths=widths, B=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("normalize", "with_state", "scale"), [(False, True, 0.5), (True, False, 1.0)]
)
def test_options(normalize, with_state, scale, dtype):
    options = {"normalize": normalize, "with_state": with_state, "scale": scale}
    check(CHUNK + 3, "padded", dtype, **options)


MUTANTS = {
    "a key after its query": ("A = tl.where(mask, A, 0)", "A = A * 1"),
    "a state goes on into the next document": ("S *= stays", "S *= 1"),
    "no bound on the keys": ("inside = own_k[:, None] &", "inside = (at_k[:, None] < BK) &"),
    "values by the key's stride": (
        "v_c = load_tile(v + start * V, rows, at < T, at_v, V)\n    out",
        "v_c = load_tile(v + start * V, rows, at < T, at_v, K)\n    out",
    ),
    "the chunks' states in the wrong order": (
        "here = (bh * n + c) * K\n        if",
        "here = (bh * n + n - 1 - c) * K\n        if",
    ),
    "no gradient through the sum of weights": ("dA += g_w[:, None]", "dA += 0 * g_w[:, None]"),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    mutate(monkeypatch, tmp_path, MODULE, *mutant)
    with pytest.raises(AssertionError):
        check(CHUNK + 3, "packed", torch.float32)
