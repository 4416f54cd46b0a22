"""What a mixer says of its cost is what is measured."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from layers.state import state_nbytes
from tests.contract.compare import random_input
from tests.contract.subjects import Factory, build


@torch.no_grad()
def check_state_bytes(make: Factory) -> None:
    """state_bytes is the size of the state that a forward pass and new_state make."""
    for dtype in (torch.float32, torch.float64):
        mixer = build(make, dtype)
        for B, T in ((1, 1), (2, 7), (3, 33)):
            said = mixer.state_bytes(B, T)
            _, state = mixer(random_input(B, T, mixer), want_state=True)
            for origin, made in (("forward", state), ("new_state", mixer.new_state(B, T))):
                held = state_nbytes(made)
                assert said == held, f"state_bytes({B}, {T}) = {said}; {origin} made {held} bytes"


@torch.no_grad()
def check_bounded_state(make: Factory) -> None:
    """bounded_state is True exactly when the bytes do not depend on the length."""
    mixer = build(make, torch.float32)
    sizes = {mixer.state_bytes(2, T) for T in (1, 64, 65_536)}
    assert mixer.bounded_state == (len(sizes) == 1), (
        f"bounded_state = {mixer.bounded_state}, yet a state has {sorted(sizes)} bytes"
    )


@torch.no_grad()
def check_flops(make: Factory) -> None:
    """flops is what FlopCounterMode counts."""
    mixer = build(make, torch.float32)
    for B, T in ((1, 1), (2, 7), (1, 64), (3, 65), (1, 130)):
        x = random_input(B, T, mixer)
        with FlopCounterMode(display=False) as counter:
            mixer(x)
        counted, said = counter.get_total_flops(), mixer.flops(B, T)
        assert said == counted, f"flops({B}, {T}) = {said}; counted {counted}"
