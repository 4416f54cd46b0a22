"""Every mixer in a whole model with backend=triton, interpreted, against backend=torch."""

from importlib import import_module

import pytest
import torch
from torch import nn

from kernels.launch import why_not_triton
from tests.kernels.compare import assert_close
from tests.kernels.guard import guarded_memory
from tests.tiny import MIXERS, SHORT, tiny_model

T = 21
# The interpreter goes through the elements of a scan one by one.
SMALL = {**SHORT, "mamba": {"d_state": 2}}
# Both sum in float32, in different orders, through two layers with large weights.
TOLERANCE = 2e-4

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        why_not_triton(torch.device("cpu"), torch.float32) is not None,
        reason=str(why_not_triton(torch.device("cpu"), torch.float32)),
    ),
]


def use(model: nn.Module, backend: str) -> nn.Module:
    """Every layer with a choice of backend takes this one."""
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model


def results(mixer: str, backend: str) -> list[torch.Tensor]:
    """Logits, then the gradients of all parameters, of documents with padding between."""
    model = use(tiny_model(mixer, mixers=SMALL), backend).eval()
    torch.manual_seed(1)
    tokens = torch.randint(0, 31, (2, T))
    segments = torch.tensor([[0] * 5 + [1] * 12 + [-1] * 4, [-1] * 2 + [4] * 19])
    logits, _ = model(tokens, segments=segments)
    valid = logits[segments >= 0]
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(valid.square().sum(), parameters, allow_unused=True)
    return [valid.detach(), *(g for g in gradients if g is not None)]


@pytest.fixture
def few_programs(monkeypatch):
    """The interpreter takes programs one by one: fewer and wider ones for the scan."""
    scan = import_module("kernels.selective_scan.triton")
    monkeypatch.setattr(scan, "STEPS", 16)
    monkeypatch.setattr(scan, "_CHANNELS", 64)


FAST = ("based", "hedgehog_window", "mamba2", "routing")  # the others take the interpreter minutes


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    "mixer", [pytest.param(m, marks=[] if m in FAST else pytest.mark.slow) for m in MIXERS]
)
def test_equals_the_torch_backend(mixer):
    expected = results(mixer, "torch")
    with guarded_memory() as launched:
        got = results(mixer, "triton")
    assert launched, "no kernel ran"
    for a, b in zip(got, expected, strict=True):
        assert_close(mixer, a, b, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["hedgehog", "lru"])
def test_compiled_equals_eager(mixer):
    """Compilers see the kernels as operators and go around them."""
    model = use(tiny_model(mixer), "triton").eval()
    tokens = torch.randint(0, 31, (2, T))
    losses = []
    for run in (model, torch.compile(model)):
        loss = run(tokens)[0].square().mean()
        losses.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*losses, strict=True):
        assert_close("compiled", a.detach(), b.detach(), TOLERANCE)
