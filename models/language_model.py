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
from models.interface import TokenModel

ModelState = tuple[Any, ...]  # one state per block, in order


class LanguageModel(TokenModel):
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
        """See TokenModel."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (B, T), T >= 1")
        return self.read(
            self.embed(tokens),
            state,
            segments=segments,
            prefix_len=prefix_len,
            want_state=want_state,
            report=report,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), what the first block reads."""
        return self.embedding_dropout(self.embedding(tokens))

    def read(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """`hidden` of vectors x (B, T, D) that stand in the place of embedded tokens.

        Raises:
            ValueError: `state` has another depth.
        """
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state is of {len(state)} blocks; this model has {len(self.blocks)}")
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
        """See TokenModel."""
        head = 2 * batch_size * length * self.d_model * self.vocab_size
        return self.hidden_flops(batch_size, length) + head

    def hidden_flops(self, batch_size: int, length: int) -> int:
        """FLOPs of `hidden`: those of `flops` without the logits."""
        tokens = batch_size * length
        channel = sum(
            block.channel_mixer.flops(tokens)  # type: ignore[union-attr, operator]
            for block in self.blocks
            if block.channel_mixer is not None
        )
        mixing = sum(mixer.flops(batch_size, length) for mixer in self.mixers)
        return mixing + channel
