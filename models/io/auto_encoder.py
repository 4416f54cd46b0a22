"""MAD's auto-encoder: a sequence is reconstructed from the vector of its last position.

B batch, T time, D model width, M width inside the decoder.
"""

from typing import Any

import torch
from torch import Tensor, nn

from layers.report import Report
from models.initialise import initialise
from models.io.base import Around
from models.language_model import LanguageModel


class AutoEncoder(Around):
    """Every position is answered when all of them have been read, and from one vector alone.

        z = h_last,   y_t = MLP(z + p_t)

    with h the blocks' output, p_t the sinusoidal code of position t (Vaswani et al. 2017, section
    3.5) and an MLP of one hidden layer and GELU; y_t is what the head reads. Source: the
    compression task of Poli et al. 2024, "Mechanistic design and scaling of hybrid architectures".
    The paper does not give the width of the MLP: twice D here.

    It hands no state on: each call reads a sequence of its own, and what it holds of one is z.

    Args:
        network: has the embedding, the blocks and the head.
        hidden: M; None is 2D.

    Parameters: network.*, decoder.0, decoder.2.

    Raises:
        ValueError: `hidden` below 1, or an odd D, of which sines and cosines take half each.
    """

    io = "auto_encoder"

    def __init__(self, network: LanguageModel, *, hidden: int | None = None) -> None:
        super().__init__(network)
        d = network.d_model
        self.width = 2 * d if hidden is None else hidden
        if self.width < 1:
            raise ValueError(f"hidden={hidden}: expected null or at least 1")
        if d % 2:
            raise ValueError(f"model.d_model={d}: expected an even number, for its position codes")
        self.decoder = nn.Sequential(nn.Linear(d, self.width), nn.GELU(), nn.Linear(self.width, d))
        initialise(self.decoder)

    @property
    def embedding(self) -> nn.Embedding:  # type: ignore[override]
        """See TokenModel."""
        return self.network.embedding

    @property
    def head(self) -> nn.Linear | None:  # type: ignore[override]
        """See TokenModel."""
        return self.network.head

    @property
    def causal(self) -> str:
        """See TokenModel."""
        return "leaky"

    @property
    def leak_reason(self) -> str:
        """See TokenModel."""
        own = "io=auto_encoder: every position is answered when all have been read"
        return "; ".join(filter(None, (own, self.network.leak_reason)))

    @property
    def supports_segments(self) -> bool:
        """See TokenModel; one document a row, padding before or behind it."""
        return False

    @property
    def bounded_state(self) -> bool:
        """See TokenModel."""
        return True

    def hidden(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, Any]:
        """See TokenModel; `segments` may tell padding from one document."""
        h, _ = self.network.hidden(tokens, segments=segments, prefix_len=prefix_len, report=report)
        position = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if segments is None:
            z = h[:, -1]
        else:
            valid = segments >= 0
            last = torch.where(valid, position, 0).amax(dim=1)
            z = h[torch.arange(len(h), device=h.device), last]
            position = (valid.cumsum(dim=1) - 1).clamp(min=0)
        code = sinusoids(position, self.d_model).to(z.dtype)  # (B, T, D)
        return self.decoder(z[:, None] + code), () if want_state else None

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """See TokenModel: nothing."""
        return ()

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Those of z."""
        return batch_size * self.d_model * self.head_weight.element_size()

    def flops(self, batch_size: int, length: int) -> int:
        """See TokenModel."""
        tokens, d = batch_size * length, self.d_model
        decoding = 2 * tokens * d * (2 * self.width + self.vocab_size)
        return self.network.hidden_flops(batch_size, length) + decoding


def sinusoids(position: Tensor, width: int) -> Tensor:
    """(..., width): sines and cosines of positions (...), at wavelengths from 2 pi to 20,000 pi."""
    rate = 10_000.0 ** (-torch.arange(0, width, 2, device=position.device) / width)
    angle = position[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)
