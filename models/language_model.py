"""The full definition of a language model of interchangeable mixers.

B batch, T time, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layers.mixer import Mixer
from layers.report import Report
from models.block import Block
from models.initialise import initialise

ModelState = tuple[Any, ...]  # one state per block, in order


class LanguageModel(nn.Module):
    """Embedding, residual blocks, final norm, linear head.

    The model keeps the mixer contract with tokens in place of vectors: state in, state out, any
    split, documents apart, padding invisible. It is as causal as its least causal mixer.

    Args:
        vocab_size: V.
        d_model: D.
        mixers: one sequence mixer per block.
        channel_mixers: one per block, None for a block without.
        norm: makes a norm of width D.
        tie_embeddings: the head shares the embedding's matrix (Press and Wolf 2017).
        dropout: on the output of every branch (residual dropout).
        embedding_dropout: on the embedded tokens.
        extra_tokens: ids from V on that can be read and are never predicted, such as a mask.

    Raises:
        ValueError: sizes that are not positive, or lists of different lengths.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        mixers: Sequence[Mixer],
        channel_mixers: Sequence[nn.Module | None],
        norm: Callable[[int], nn.Module],
        *,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        extra_tokens: int = 0,
    ) -> None:
        super().__init__()
        if vocab_size < 1 or d_model < 1 or not mixers:
            raise ValueError(
                f"vocab_size={vocab_size}, d_model={d_model}, {len(mixers)} mixers: "
                "each must be at least 1"
            )
        if extra_tokens < 0:
            raise ValueError(f"extra_tokens={extra_tokens}: expected at least 0")
        if len(mixers) != len(channel_mixers):
            raise ValueError(f"{len(mixers)} mixers but {len(channel_mixers)} channel mixers")
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.extra_tokens = extra_tokens
        self.embedding = nn.Embedding(vocab_size + extra_tokens, d_model)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.blocks = nn.ModuleList(
            Block(
                m, c, [norm(d_model), norm(d_model)] if c is not None else [norm(d_model)], dropout
            )
            for m, c in zip(mixers, channel_mixers, strict=True)
        )
        self.final_norm = norm(d_model)
        self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)
        initialise(self)

    @property
    def mixers(self) -> list[Mixer]:
        """The sequence mixers, first block first."""
        return [block.mixer for block in self.blocks]  # type: ignore[union-attr]

    @property
    def head_weight(self) -> Tensor:
        """(V, D), whether tied or not."""
        if self.head is not None:
            return self.head.weight
        weight = self.embedding.weight
        return weight[: self.vocab_size] if self.extra_tokens else weight

    @property
    def causal(self) -> str:
        """The weakest promise of any mixer: "leaky" over "prefix" over "strict"."""
        kinds = {mixer.causal for mixer in self.mixers}
        return next(kind for kind in ("leaky", "prefix", "strict") if kind in kinds)

    @property
    def leak_reason(self) -> str:
        """Why the model sees the future, in one line; empty when it does not."""
        return "; ".join(dict.fromkeys(m.leak_reason for m in self.mixers if m.leak_reason))

    @property
    def supports_segments(self) -> bool:
        """Whether every mixer keeps documents apart."""
        return all(mixer.supports_segments for mixer in self.mixers)

    @property
    def bounded_state(self) -> bool:
        """Whether the state's size is independent of the length seen."""
        return all(mixer.bounded_state for mixer in self.mixers)

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
        """What the head reads: (B, T, D) after the final norm, and the state.

        Arguments as in the mixer contract, with `tokens` int (B, T) in
        [0, V + extra_tokens).

        Raises:
            ValueError: `tokens` is not (B, T) with T >= 1, or `state` has another depth.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (B, T), T >= 1")
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state is of {len(state)} blocks; this model has {len(self.blocks)}")
        x = self.embedding_dropout(self.embedding(tokens))
        states = []
        for i, block in enumerate(self.blocks):
            arguments: dict[str, Any] = {
                "segments": segments,
                "prefix_len": prefix_len,
                "want_state": want_state,
                "report": report,
            }
            past = None if state is None else state[i]
            if report is None:
                x, after = block(x, past, **arguments)
            else:
                with report.scope(f"block{i}"):
                    x, after = block(x, past, **arguments)
            states.append(after)
        return self.final_norm(x), tuple(states) if want_state else None

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, ModelState | None]:
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

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState:
        """The empty past, with room for `max_len` positions in every state that grows."""
        return tuple(mixer.new_state(batch_size, max_len, device, dtype) for mixer in self.mixers)

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Bytes of the whole state after `length` positions."""
        return sum(mixer.state_bytes(batch_size, length) for mixer in self.mixers)

    def flops(self, batch_size: int, length: int) -> int:
        """FLOPs of `forward` from the empty past, logits included, as FlopCounterMode counts."""
        tokens = batch_size * length
        channel = sum(
            block.channel_mixer.flops(tokens)  # type: ignore[union-attr, operator]
            for block in self.blocks
            if block.channel_mixer is not None
        )
        mixing = sum(mixer.flops(batch_size, length) for mixer in self.mixers)
        return mixing + channel + 2 * tokens * self.d_model * self.vocab_size
