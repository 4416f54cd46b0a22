"""The loss with its Triton softmax against the float64 formula, and mutants. V vocabulary."""

from importlib import import_module

import pytest
import torch

from kernels import linear_cross_entropy, linear_nll
from tests.kernels.compare import TOLERANCE, assert_close, assert_forms_agree
from tests.kernels.guard import mutate
from tests.kernels.test_linear_cross_entropy import inputs

MODULE = "kernels.linear_cross_entropy.triton"


def check(N=33, V=60, *, chunk=16, dtype=torch.float32, size=1.0):
    """The loss and both gradients; a vocabulary of several tiles."""
    x, weight, targets = inputs(N, V=V, ignored=0.3 if N > 1 else 0)

    def form(backend, x, weight):
        return (linear_cross_entropy(x, weight, targets, chunk=chunk, backend=backend),)

    assert_forms_agree(form, [x * size, weight], dtype, backend="triton")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(import_module(MODULE), "_MOST", 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [11, 31, 32, 33, 96])
@pytest.mark.parametrize("N", [1, 33])
def test_forms_agree(N, V, dtype):
    check(N, V, dtype=dtype)


def test_extreme_logits():
    check(size=100.0)


def test_each_loss():
    x, weight, targets = (t.float() if t.is_floating_point() else t for t in inputs(40, V=70))
    expected = linear_nll(x.double(), weight.double(), targets, backend="reference")
    nll = linear_nll(x, weight, targets, chunk=16, backend="triton")
    assert_close("nll", nll, expected, TOLERANCE[torch.float32])


def test_no_target_at_all():
    x, weight, _ = (t.float() for t in inputs(5))
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, torch.full((5,), -100), backend="triton")
    assert loss == 0
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


MUTANTS = {
    "no bound on the vocabulary": ("mask=at < V, other=LOWEST).to(tl.float32)\n"
                                   "        higher",
                                   "mask=at < start + BV, other=LOWEST).to(tl.float32)\n"
                                   "        higher"),
    "rows one further apart": ("logits + token * V", "logits + token * (V + 1)"),
    "sums of the last tile's maximum": ("total * tl.exp(top - higher) +", "total +"),
    "no target in the gradient": ("- (at == target).to(tl.float32)", "- 0.0"),
    "writes past the row": ("g.to(row.dtype.element_ty), mask=at < V",
                            "g.to(row.dtype.element_ty), mask=at < V + BV"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, mutant):
    monkeypatch.setattr(mutate(monkeypatch, tmp_path, MODULE, *mutant), "_MOST", 32)
    with pytest.raises(AssertionError):
        check()
