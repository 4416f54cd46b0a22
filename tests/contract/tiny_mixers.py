"""A small mixer that keeps the contract, and one that breaks each clause of it.

B batch, T time, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.marks import mark
from layers.mixer import Mixer
from layers.segments import NO_DOCUMENT, join, keep_rows

D = 4


@dataclass(frozen=True, eq=False)
class TinyState:
    h: Tensor  # (B, D)
    segment: Tensor  # (B,)


class Tiny(Mixer):
    """h_t = sigmoid(a) h_{t-1} + W x_t, y_t = V h_t."""

    bounded_state = True
    state_type = TinyState

    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.proj_in = nn.Linear(D, D, bias=False)
        self.proj_out = nn.Linear(D, D, bias=False)
        self.a = nn.Parameter(torch.linspace(0, 2, D))
        mark(self, "a", decay=False, own_init=True)

    def forward(
        self, x, state=None, *, segments=None, prefix_len=None, want_state=False, report=None
    ):
        self.check_input(x, state, segments)
        B, T = x.shape[:2]
        state = self.new_state(B, T, dtype=x.dtype) if state is None else state
        carry, last = join(state.segment, segments)
        h = keep_rows(carry, state.h)
        document = None
        outputs = []
        for t, u in enumerate(self.proj_in(x).unbind(1)):
            if segments is None:
                h = self.step(h, u)
            else:
                here = segments[:, t]
                if document is not None:
                    h = self.enter(h, (here >= 0) & (document >= 0) & (here != document))
                h = self.pad(torch.where((here >= 0)[:, None], self.step(h, u), h), here < 0)
                document = here if document is None else torch.where(here >= 0, here, document)
            outputs.append(h)
        y = self.proj_out(torch.stack(outputs, 1))
        return y, TinyState(h.to(x.dtype), last) if want_state else None

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        return self.a.sigmoid() * h + u

    def enter(self, h: Tensor, starts: Tensor) -> Tensor:
        return h.masked_fill(starts[:, None], 0)

    def pad(self, h: Tensor, padding: Tensor) -> Tensor:
        return h

    def new_state(self, batch_size, max_len, device=None, dtype=None):
        h = torch.zeros(batch_size, D, device=device, dtype=dtype or self.a.dtype)
        return TinyState(h, torch.full((batch_size,), NO_DOCUMENT, device=device))

    def state_bytes(self, batch_size, length):
        return batch_size * (D * self.a.dtype.itemsize + 8)

    def flops(self, batch_size, length):
        return 4 * batch_size * length * D * D


class LeaksOneStep(Tiny):
    def forward(self, x, state=None, **context):
        y, after = super().forward(x, state, **context)
        return y + 1e-3 * torch.cat([x[:, 1:], x[:, -1:]], dim=1), after


class ForgetsOnSplit(Tiny):
    def forward(self, x, state=None, **context):
        self.check_input(x, state)
        return super().forward(x, None, **context)


class StateOfAnotherStep(Tiny):
    """The outputs of pieces are right, the final state is not."""

    def forward(self, x, state=None, *, want_state=False, **context):
        y, after = super().forward(x, state, want_state=want_state, **context)
        return y, TinyState(after.h + 1e-3, after.segment) if want_state else None


class DetachesState(Tiny):
    def forward(self, x, state=None, *, want_state=False, **context):
        y, after = super().forward(x, state, want_state=want_state, **context)
        return y, TinyState(after.h.detach(), after.segment) if want_state else None


class MixesDocuments(Tiny):
    def enter(self, h, starts):
        return h


class MixesDocumentsOfCalls(Tiny):
    """Resets inside a call, and takes any state for the past of its first document."""

    def forward(self, x, state=None, *, segments=None, **context):
        if state is not None and segments is not None:
            state = TinyState(state.h, segments.amax(1))
        return super().forward(x, state, segments=segments, **context)


class DecaysOnPadding(Tiny):
    def pad(self, h, padding):
        return torch.where(padding[:, None], self.a.sigmoid() * h, h)


class ReadsPadding(Tiny):
    """Only what stands at padded positions of the input reaches the state."""

    def forward(self, x, state=None, *, segments=None, **context):
        if segments is not None:
            noise = x * (segments < 0)[..., None]
            x = x + noise.cumsum(1)
        return super().forward(x, state, segments=segments, **context)


class UnderstatesBytes(Tiny):
    def state_bytes(self, batch_size, length):
        return batch_size * D * self.a.dtype.itemsize


class UnderstatesFlops(Tiny):
    def flops(self, batch_size, length):
        return 2 * batch_size * length * D * D


class SaysBoundedStateGrows(Tiny):
    bounded_state = False


class SaysTheWrongKind(Tiny):
    bounded_state = "yes"


class _Box:
    def __init__(self, h: Tensor) -> None:
        self.h = h


@dataclass(frozen=True, eq=False)
class BoxedState(TinyState):
    box: _Box


class HidesStateFromTools(Tiny):
    """What it goes on from is where selecting rows of a state does not reach it."""

    def forward(self, x, state=None, *, want_state=False, **context):
        self.check_input(x, state)
        if isinstance(state, BoxedState):
            h = state.box.h[torch.arange(x.shape[0]) % state.box.h.shape[0]]
            state = TinyState(h, state.segment)
        y, after = super().forward(x, state, want_state=want_state, **context)
        return y, BoxedState(after.h, after.segment, _Box(after.h)) if want_state else None


class RowsInteract(Tiny):
    def step(self, h, u):
        return super().step(h, u - u.mean(0))


class ChangesGivenState(Tiny):
    def forward(self, x, state=None, *, want_state=False, **context):
        y, after = super().forward(x, state, want_state=want_state, **context)
        if state is not None and want_state and not torch.is_grad_enabled():
            state.h.copy_(after.h)
        return y, after


class IsRandom(Tiny):
    def step(self, h, u):
        return super().step(h, u + 1e-4 * torch.rand_like(u))


class AlwaysReturnsState(Tiny):
    def forward(self, x, state=None, *, want_state=False, **context):
        return super().forward(x, state, want_state=True, **context)


class KeepsActivations(Tiny):
    def forward(self, x, state=None, **context):
        y, after = super().forward(x, state, **context)
        self.last_output = y
        return y, after


class Overflows(Tiny):
    def step(self, h, u):
        return self.a.sigmoid() * h + u.exp() - 1


class NewStateIsNotEmpty(Tiny):
    def new_state(self, batch_size, max_len, device=None, dtype=None):
        state = super().new_state(batch_size, max_len, device, dtype)
        return TinyState(state.h + 1, state.segment)

    def forward(self, x, state=None, **context):
        if state is None:
            empty = Tiny.new_state(self, x.shape[0], x.shape[1], dtype=x.dtype)
            return super().forward(x, empty, **context)
        return super().forward(x, state, **context)


class ReadsPrefix(Tiny):
    def forward(self, x, state=None, *, prefix_len=None, **context):
        y, after = super().forward(x, state, **context)
        return y if prefix_len is None else y + prefix_len[:, None, None], after


class LosesMarksOnCopy(Tiny):
    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.__dict__.pop("_seqmix_marks")
        return twin


class HasUnsavedNumbers(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.rand(D)

    def step(self, h, u):
        return super().step(h, u * self.gain.to(u.dtype))


class AcceptsAnything(Tiny):
    def check_input(self, x, state=None, segments=None):
        pass


class BranchesOnCompilation(Tiny):
    def step(self, h, u):
        return super().step(h, u * (2 if torch.compiler.is_compiling() else 1))
