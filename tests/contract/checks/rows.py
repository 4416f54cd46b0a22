"""The rows of a batch do not know of each other."""

import torch

from layers.state import detach_state, repeat_batch, select_batch
from tests.contract.compare import (
    assert_close,
    assert_states_close,
    random_input,
)
from tests.contract.subjects import Factory, build


@torch.no_grad()
def check_batch_invariance(make: Factory) -> None:
    """A row alone equals the row in a batch, in any order of the rows, and after a past."""
    mixer = build(make)
    x = random_input(3, 15, mixer)
    y, end = mixer(x, want_state=True)
    z, _ = mixer(x[:, :4], end)
    order = torch.tensor([2, 0, 1])
    for what, rows in (
        ("permuted", order),
        *((f"row {b} alone", order[:1] * 0 + b) for b in range(3)),
    ):
        got, got_end = mixer(x[rows], want_state=True)
        assert_close(f"output, {what}", got, y[rows])
        assert_states_close(what, got_end, select_batch(end, rows))
        assert_close(f"next output, {what}", mixer(x[rows, :4], got_end)[0], z[rows])


def check_state_tools(make: Factory) -> None:
    """States are selected, repeated and detached by rows, and go on from there."""
    mixer = build(make)
    x = random_input(2, 9, mixer).requires_grad_()
    following = random_input(2, 3, mixer, seed=4)
    _, state = mixer(x, want_state=True)
    expected, end = mixer(following, state, want_state=True)
    rows = torch.tensor([1, 0, 0])
    got, got_end = mixer(following[rows], select_batch(state, rows), want_state=True)
    assert_close("output of selected rows", got, expected[rows])
    assert_states_close("selected rows", got_end, select_batch(end, rows))
    twice = torch.tensor([0, 0, 1, 1])
    assert_close(
        "output of repeated rows",
        mixer(following[twice], repeat_batch(state, 2))[0],
        expected[twice],
    )
    y, _ = mixer(following, detach_state(state))
    assert_close("output of a detached state", y, expected)
    assert torch.autograd.grad(y.sum(), x, allow_unused=True) == (None,), "detached, and yet joined"
