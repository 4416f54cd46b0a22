"""Documents in a convolution: valid tokens side by side, and how far back each may look.

B batch, T time, D channels, W taps.
"""

import torch
from torch import Tensor

from kernels.segments import first_document, restarts


class Documents:
    """Arranges the tokens of each row so that padding follows all valid tokens.

    Args:
        segments: int (B, T), or None for one document without padding.
        taps: W.

    Attributes:
        reach: (B, T) how many tokens before each are of its document, W - 1 at most and in the
            first document; None where it is W - 1 everywhere.
    """

    def __init__(self, segments: Tensor | None, taps: int) -> None:
        self._order = self._back = self.reach = None
        if segments is None:
            return
        padding = segments < 0
        if (padding[:, :-1] & ~padding[:, 1:]).any():  # a valid token follows padding
            self._order = padding.to(torch.uint8).argsort(dim=1, stable=True)[..., None]
            self._back = self._order.argsort(1)
            segments = segments.gather(1, self._order[..., 0])
        starts = restarts(segments)
        if starts.any():
            self.reach = _tokens_before(starts, taps - 1)

    def arrange(self, x: Tensor) -> Tensor:
        """x (B, T, D) in the order in which it is convolved."""
        return x if self._order is None else torch.take_along_dim(x, self._order, 1)

    def restore(self, y: Tensor) -> Tensor:
        """y (B, T, D) in the caller's order."""
        return y if self._back is None else torch.take_along_dim(y, self._back, 1)

    def within(self, x: Tensor, start: int, lag: int) -> Tensor:
        """x (B, L, D) with zeros at the positions t from `start` that t - lag is not visible to."""
        if self.reach is None or lag == 0:
            return x
        T = self.reach.shape[1]
        skipped, end = max(0, -start), min(start + x.shape[1], T)
        seen = self.reach[:, max(0, start) : max(0, end)] >= lag
        rest = x.shape[1] - skipped - seen.shape[1]
        if skipped or rest:  # positions outside the sequence hold zeros already
            seen = torch.nn.functional.pad(seen, (skipped, rest), value=True)
        return x * seen[..., None]


def _tokens_before(starts: Tensor, most: int) -> Tensor:
    """(B, T) tokens of its own document before each token, `most` at most.

    The first document of a row has `most` before it: the state.
    """
    position = torch.arange(starts.shape[1], device=starts.device)
    since = torch.where(starts, position, -most).cummax(1).values
    return (position - since).clamp(max=most)


def last_inputs(x: Tensor, state: Tensor, segments: Tensor | None) -> Tensor:
    """The last W - 1 inputs of each row's last document, (B, W-1, D), newest last.

    Args:
        x: (B, T, D).
        state: (B, W-1, D) of the first document.
    """
    reach = state.shape[1]
    if reach == 0:
        return state
    if segments is None:
        if x.shape[1] < reach:
            x = torch.cat([state.to(x.dtype), x], 1)
        return x[:, -reach:].clone()
    first = first_document(segments).clamp(min=0)[:, None]
    names = torch.cat([first.expand(-1, reach), segments], 1)
    mine = names == torch.maximum(segments.amax(1, keepdim=True), first)
    newest = mine.to(torch.uint8).argsort(dim=1, stable=True)[:, -reach:]
    inputs = torch.cat([state.to(x.dtype), x], 1)
    inputs = torch.take_along_dim(inputs, newest[..., None], 1)
    return inputs.masked_fill(~mine.gather(1, newest)[..., None], 0)
