"""Pairs of fixed vectors in place of embedded tokens, fixed vectors in place of a learnt head.

B batch, T time, D model width, V ids, E width of a vector.
"""

import numpy as np
import torch
from torch import Tensor, nn

from layers.report import Report
from models.initialise import initialise
from models.io.base import Around
from models.language_model import LanguageModel, ModelState


class Vectors(Around):
    """A model of continuous inputs: it is shown vectors that it does not choose.

        x_t = W_in [table[first] ; table[second]],   logits_t = table W_out h_t

    for an input first * V + second. The rows of the table are drawn once, of length 1, uniformly in
    direction, and are not trained; row 0 is zero: nothing is there. Zoology's continuous MQAR shows
    a key and its value this way, and a query as a key without a value.

    Args:
        network: has the blocks. Its embedding and head are dropped.
        width: E.
        seed: of the table.

    Parameters: network.blocks.*, network.final_norm.*, reads (D, 2E), answers (E, D); the table is
    `embedding`, which takes no gradient.

    Raises:
        ValueError: `width` below 1, or extra tokens, which would have no row.
    """

    io = "vectors"

    def __init__(self, network: LanguageModel, *, width: int, seed: int = 0) -> None:
        super().__init__(network)
        if width < 1:
            raise ValueError(f"width={width}: expected at least 1")
        if network.extra_tokens:
            raise ValueError(f"extra_tokens={network.extra_tokens}: expected 0")
        self.width = width
        self.embedding = nn.Embedding.from_pretrained(_table(network.vocab_size, width, seed))
        self.head = None
        self.reads = nn.Linear(2 * width, network.d_model, bias=False)
        self.answers = nn.Linear(network.d_model, width, bias=False)
        for layer in (self.reads, self.answers):
            initialise(layer)
        network.embedding = network.head = None  # type: ignore[assignment]

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the vectors as the blocks' answers are compared with them."""
        return self.embedding.weight @ self.answers.weight

    def hidden(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """See TokenModel; `tokens` are pairs first * V + second."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (B, T), T >= 1")
        first = tokens.div(self.vocab_size, rounding_mode="floor")
        second = tokens.remainder(self.vocab_size)
        vectors = torch.cat([self.embedding(first), self.embedding(second)], dim=-1)  # (B, T, 2E)
        return self.network.read(
            self.network.embedding_dropout(self.reads(vectors)),
            state,
            segments=segments,
            prefix_len=prefix_len,
            want_state=want_state,
            report=report,
        )

    def flops(self, batch_size: int, length: int) -> int:
        """See TokenModel."""
        tokens, d, v = batch_size * length, self.d_model, self.vocab_size
        ends = 2 * self.width * (2 * tokens * d + v * d) + 2 * tokens * d * v
        return self.network.hidden_flops(batch_size, length) + ends


def _table(rows: int, width: int, seed: int) -> Tensor:
    """(rows, width) of length 1, the first zero; numpy, for the same values on every device."""
    table = np.random.default_rng(seed).normal(size=(rows, width))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    table[0] = 0
    return torch.from_numpy(table).float()
