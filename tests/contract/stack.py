"""Several mixers run as one, as blocks of a network run them."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.functional import rms_norm

from layers.mixer import Mixer


class Stack(Mixer):
    """x + mixer(norm(x)) for each of `mixers` in turn; the state is the tuple of theirs.

    It promises what the weakest of its mixers promises.
    """

    state_type = tuple

    def __init__(self, mixers: Sequence[Mixer]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.d_model = mixers[0].d_model
        kinds = {mixer.causal for mixer in mixers}
        self.causal = next(kind for kind in ("leaky", "prefix", "strict") if kind in kinds)
        self.leak_reason = "; ".join(m.leak_reason for m in mixers if m.leak_reason)
        self.supports_segments = all(mixer.supports_segments for mixer in mixers)
        self.bounded_state = all(mixer.bounded_state for mixer in mixers)

    def forward(self, x, state=None, *, want_state=False, **context):
        self.check_input(x, state, context.get("segments"))
        states: list[Any] = []
        for i, mixer in enumerate(self.mixers):
            past = None if state is None else state[i]
            y, after = mixer(rms_norm(x, x.shape[-1:]), past, want_state=want_state, **context)
            states.append(after)
            x = x + y
        return x, tuple(states) if want_state else None

    def new_state(self, batch_size, max_len, device=None, dtype=None):
        return tuple(m.new_state(batch_size, max_len, device, dtype) for m in self.mixers)

    def state_bytes(self, batch_size, length):
        return sum(mixer.state_bytes(batch_size, length) for mixer in self.mixers)

    def flops(self, batch_size, length):
        return sum(mixer.flops(batch_size, length) for mixer in self.mixers)
