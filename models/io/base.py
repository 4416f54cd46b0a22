"""What stands around the blocks of a language model and passes its facts on."""

from typing import Any

import torch

from models.interface import TokenModel
from models.language_model import LanguageModel


class Around(TokenModel):
    """A language model's blocks behind inputs, or before answers, of another kind.

    Args:
        network: has the blocks; its weights are trained.
    """

    def __init__(self, network: LanguageModel) -> None:
        super().__init__()
        self.vocab_size = network.vocab_size
        self.d_model = network.d_model
        self.extra_tokens = network.extra_tokens
        self.network = network

    @property
    def causal(self) -> str:
        """See TokenModel."""
        return self.network.causal

    @property
    def leak_reason(self) -> str:
        """See TokenModel."""
        return self.network.leak_reason

    @property
    def supports_segments(self) -> bool:
        """See TokenModel."""
        return self.network.supports_segments

    @property
    def bounded_state(self) -> bool:
        """See TokenModel."""
        return self.network.bounded_state

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """See TokenModel."""
        return self.network.new_state(batch_size, max_len, device, dtype)

    def state_bytes(self, batch_size: int, length: int) -> int:
        """See TokenModel."""
        return self.network.state_bytes(batch_size, length)
