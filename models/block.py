"""One residual block: a sequence mixer, then a channel mixer, each behind a norm."""

from typing import Any

from torch import Tensor, nn

from layers.mixer import Mixer
from layers.report import Report


class Block(nn.Module):
    """x + mixer(norm(x)), then x + channel_mixer(norm(x)) where there is one (pre-norm).

    Args:
        mixer: the sequence mixer.
        channel_mixer: (B, T, D) -> (B, T, D) per position, or None.
        norms: one norm per mixer above, in that order.
        dropout: probability of dropping an element of either branch's output.
    """

    def __init__(
        self,
        mixer: Mixer,
        channel_mixer: nn.Module | None,
        norms: list[nn.Module],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer_norm = norms[0]
        self.mixer = mixer
        self.channel_norm = norms[1] if channel_mixer is not None else None
        self.channel_mixer = channel_mixer
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, T, D) -> (B, T, D) and the mixer's state, under the mixer contract."""
        y, state = self.mixer(
            self.mixer_norm(x),
            state,
            segments=segments,
            prefix_len=prefix_len,
            want_state=want_state,
            report=report,
        )
        x = x + self.dropout(y)
        if self.channel_mixer is not None and self.channel_norm is not None:
            x = x + self.dropout(self.channel_mixer(self.channel_norm(x)))
        return x, state
