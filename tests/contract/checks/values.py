"""Calls are functions of their arguments: repeatable, without traces, and finite."""

from typing import Any

import torch
from torch import Tensor, nn

from layers.report import Report
from layers.state import tensors
from tests.contract.compare import assert_equal, copy_state, random_input
from tests.contract.subjects import Factory, build


@torch.no_grad()
def check_deterministic(make: Factory) -> None:
    """The same call gives the same bits, and so does the same mixer built again."""
    mixer, twin = build(make, torch.float32), build(make, torch.float32)
    x = random_input(2, 66, mixer)
    first = mixer(x, want_state=True)
    for again in (mixer(x, want_state=True), twin(x, want_state=True)):
        assert_equal("repeated call", again, first)


@torch.no_grad()
def check_state_is_value(make: Factory) -> None:
    """A state can be stepped from as often as one likes; no step changes what others hold."""
    mixer = build(make, torch.float32)
    x = random_input(2, 12, mixer)
    _, prefilled = mixer(x[:, :5], want_state=True)
    for start in (prefilled, mixer.new_state(2, 12)):
        held, copies, outputs = [start], [copy_state(start)], []
        for t in range(6, 9):  # a line of steps, every state of which stays in someone's hands
            y, state = mixer(x[:, t : t + 1], held[-1], want_state=True)
            held.append(state)
            copies.append(copy_state(state))
            outputs.append(y)
        for i, state in enumerate(held[:-1]):  # branches off every one of them, and the same again
            mixer(x[:, 9:11], state, want_state=True)
            y, after = mixer(x[:, 6 + i : 7 + i], state, want_state=True)
            assert_equal(f"step {i} repeated", (y, after), (outputs[i], copies[i + 1]))
        for i, (state, copy) in enumerate(zip(held, copies, strict=True)):
            assert_equal(f"state {i} after later steps", state, copy)


def check_want_state(make: Factory) -> None:
    """No state unless asked for, and the same output either way."""
    mixer = build(make)
    x = random_input(2, 9, mixer)
    plain, nothing = mixer(x)
    y, state = mixer(x, want_state=True)
    assert nothing is None, f"want_state=False returned a {type(nothing).__name__}"
    assert state is not None, "want_state=True returned None"
    assert_equal("output with the state asked for", y, plain)
    later, nothing = mixer(x, state)
    assert nothing is None, f"want_state=False returned a {type(nothing).__name__}"
    assert_equal(
        "later output with the state asked for", mixer(x, state, want_state=True)[0], later
    )


def check_leaves_nothing_behind(make: Factory) -> None:
    """No tensor stays in the module, and a report changes nothing but the report."""
    mixer = build(make)
    x = random_input(2, 9, mixer)
    buffers = [b.clone() for b in mixer.buffers()]
    before = _held_tensors(mixer)
    y, state = mixer(x, want_state=True)
    mixer(x, state)
    report = Report()
    reported, _ = mixer(x, report=report)
    assert _held_tensors(mixer) == before, "a forward pass left tensors in the module"
    assert_equal("buffers after forward passes", list(mixer.buffers()), buffers)
    assert_equal("output with a report", reported, y)
    for name, loss in report.losses.items():
        assert loss.ndim == 0, f"loss {name} has shape {tuple(loss.shape)}"
        assert loss.isfinite(), f"loss {name} is not finite"


def check_extremes(make: Factory) -> None:
    """Under bfloat16 autocast, huge and tiny inputs give finite outputs, states and gradients."""
    mixer = build(make, torch.float32)
    x = random_input(2, 70, mixer)
    x[:, 5::9] *= 1e3  # saturated gates and peaked attention
    x[:, 7::9] = 0  # nothing at all
    x[:, 8::9] *= 1e-6
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x[:, :66], want_state=True)
        z, state = mixer(x[:, 66:], state, want_state=True)
    for name, t in (("output", y), ("later output", z), *_numbered("state", state)):
        assert t.isfinite().all(), f"{name} is not finite"
    parameters = dict(mixer.named_parameters())
    loss = y.float().square().mean() + z.float().square().mean()
    grads = torch.autograd.grad(loss, [x, *parameters.values()], allow_unused=True)
    for name, grad in zip(["x", *parameters], grads, strict=True):
        assert grad is None or grad.isfinite().all(), f"gradient of {name} is not finite"


def _held_tensors(mixer: nn.Module) -> set[int]:
    """ids of all tensors that the attributes of the module and of its children hold."""
    return {id(t) for module in mixer.modules() for t in _within(vars(module))}


def _within(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in _within(each)]
    if isinstance(value, (list, tuple, set)):
        return [t for each in value for t in _within(each)]
    return []


def _numbered(name: str, state: Any) -> list[tuple[str, Tensor]]:
    return [(f"{name} {i}", t) for i, t in enumerate(tensors(state)) if t.is_floating_point()]
