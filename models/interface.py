"""What training, evaluation and generation need of a model that reads tokens.

B batch, T time, D model width, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layers.report import Report


class TokenModel(nn.Module, ABC):
    """Tokens to logits under the mixer contract: state in, state out, any split, documents apart.

    Attributes:
        io: the file of conf/io/ that says how inputs are read and answers given.
        vocab_size: V.
        d_model: D.
        extra_tokens: ids from V on that can be read and are never predicted.
        embedding: of the V + extra_tokens ids.
        head: makes the logits; None where it shares the embedding's matrix.
    """

    io: ClassVar[str] = "tokens"
    vocab_size: int
    d_model: int
    extra_tokens: int
    embedding: nn.Embedding
    head: nn.Linear | None

    @property
    @abstractmethod
    def causal(self) -> str:
        """What the logits may depend on: "strict", "prefix" or "leaky" (layers/mixer.py)."""

    @property
    @abstractmethod
    def leak_reason(self) -> str:
        """Why the model sees the future, in one line; empty when it does not."""

    @property
    @abstractmethod
    def supports_segments(self) -> bool:
        """Whether documents are kept apart."""

    @property
    @abstractmethod
    def bounded_state(self) -> bool:
        """Whether the state stays below a size that does not depend on the length seen."""

    @abstractmethod
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
        """What the head reads: (B, T, D) after the final norm, and the state.

        Arguments as in the mixer contract, with `tokens` int (B, T) in
        [0, V + extra_tokens).

        Raises:
            ValueError: `tokens` is not (B, T) with T >= 1, or `state` is of another model.
        """

    @abstractmethod
    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The empty past, with room for `max_len` positions in every state that grows."""

    @abstractmethod
    def state_bytes(self, batch_size: int, length: int) -> int:
        """Bytes of the whole state after `length` positions."""

    @abstractmethod
    def flops(self, batch_size: int, length: int) -> int:
        """FLOPs of `forward` from the empty past, logits included, as FlopCounterMode counts."""

    @property
    def head_weight(self) -> Tensor:
        """(V, D), whether tied or not."""
        if self.head is not None:
            return self.head.weight
        weight = self.embedding.weight
        return weight[: self.vocab_size] if self.extra_tokens else weight

    def forward(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits (B, T, V) of the next token at every position, and the state.

        Training and scoring use `hidden` with linear_cross_entropy instead, which never holds
        the logits of a whole batch.
        """
        h, state = self.hidden(
            tokens,
            state,
            segments=segments,
            prefix_len=prefix_len,
            want_state=want_state,
            report=report,
        )
        return nn.functional.linear(h, self.head_weight), state
