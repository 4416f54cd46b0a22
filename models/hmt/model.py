"""The hierarchical memory transformer (HMT): a language model that reads in segments.

B batch, T time, D model width, V vocabulary, L tokens of a segment, N memories kept.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layers.report import Report
from layers.segments import join, keep_rows
from layers.state import select_batch
from models.hmt.memory import Kind, Query, SegmentMemory
from models.hmt.reading import Reading
from models.hmt.state import HMTState, empty_state
from models.hmt.streams import Streams, unpack
from models.interface import TokenModel
from models.language_model import LanguageModel


class HMT(TokenModel):
    """Segments of L tokens, read by any language model between embeddings of its own memories.

        S_n = BB([T ; E(j tokens) ; T])_last                     summary
        P_n = recall(S_n, M_{n-1} .. M_{n-N}),  P_0 = m_0        layers/memory_recall.py
        H_n, M_n = BB([P_n ; E(k tokens before) ; E(X_n) ; P_n]) M_n at the last position

    with BB the backbone from the empty past, after its final norm, E its embedding, X_n the
    segment, and H_n what the head reads. Source: He et al. 2024 (HMT: Hierarchical memory
    transformer, arXiv 2405.06067), section 3, and its public code.

    Cost: L tokens take the backbone over L + k + 2 and over j + 2 positions. The state stays
    below the memories and the backbone's state after L + k + 1 positions.

    Differs from the paper:
    - The query reads the last j tokens of the segment before ("previous_tail"). The published
      one reads the first j of the segment itself ("current_prefix"), so that logits at its
      offsets 0 .. j - 2 depend on tokens up to offset j - 1; in a call that opens a segment with
      fewer tokens, on those. It is marked "leaky".
    - Recall is scaled by sqrt(K) at every width, and K is D unless set: 4096 in the public code.
    - The last k tokens are those of the document, however short a segment is.
    - Every position is scored, where the public code scores the last segment of a sample.
    - `bptt_depth` cuts gradients also inside a sample; there, only the sample's end does.

    Args:
        backbone: the language model that is wrapped; its weights are trained.
        segment_len: L. What the paper calls segment length is the window L + k + 2.
        summary_len: j, up to L; None is half of L.
        sensory_len: k, up to L.
        max_memories: N; the oldest is dropped.
        recall_dim: K; None is D.
        query: see above.
        kind: "hierarchical"; "recurrent", the flat ablation, has P_n = M_{n-1} and with k = 0 is
            a recurrent memory transformer with one memory token; "off" has no memory embeddings.
        bptt_depth: the segments that a call reads of a document are taken in groups of as many,
            the last one full, and memories from before a group carry no gradient into it: a loss
            reaches at most bptt_depth - 1 memories back. None: all of them.

    Parameters: backbone.*, memory.* (SegmentMemory).

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        backbone: LanguageModel,
        *,
        segment_len: int,
        summary_len: int | None = None,
        sensory_len: int = 0,
        max_memories: int = 300,
        recall_dim: int | None = None,
        query: Query = "previous_tail",
        kind: Kind = "hierarchical",
        bptt_depth: int | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = backbone.vocab_size
        self.d_model = backbone.d_model
        self.extra_tokens = backbone.extra_tokens
        self.backbone = backbone
        self.memory = SegmentMemory(
            backbone.embedding,
            segment_len=segment_len,
            summary_len=summary_len,
            sensory_len=sensory_len,
            max_memories=max_memories,
            recall_dim=recall_dim,
            query=query,
            kind=kind,
            bptt_depth=bptt_depth,
        )

    @property
    def embedding(self) -> nn.Embedding:  # type: ignore[override]
        """The backbone's."""
        return self.backbone.embedding

    @property
    def head(self) -> nn.Linear | None:  # type: ignore[override]
        """The backbone's."""
        return self.backbone.head

    @property
    def causal(self) -> str:
        """Leaky if the query or the backbone is, else strict: prefixes are refused."""
        return "leaky" if self.leak_reason else "strict"

    @property
    def leak_reason(self) -> str:
        """See TokenModel."""
        return "; ".join(filter(None, (self.backbone.leak_reason, self.memory.leak_reason)))

    @property
    def supports_segments(self) -> bool:
        """Whether the backbone keeps documents apart."""
        return self.backbone.supports_segments

    @property
    def bounded_state(self) -> bool:
        """Always: memories and the past of one segment."""
        return True

    def hidden(
        self,
        tokens: Tensor,
        state: HMTState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, HMTState | None]:
        """See TokenModel. Where rows stand is read on the host, which waits for the device.

        Raises:
            ValueError: also, a prefix for a backbone that would read it in both directions.
        """
        self._check_input(tokens, state, segments, prefix_len)
        past = self.new_state(len(tokens), 0) if state is None else state
        carry, last = join(past.segment, segments)
        streams = unpack(tokens, segments, carry)
        reading = Reading(
            self.backbone,
            self.memory,
            streams,
            _of_streams(past, streams),
            keep=want_state,
            report=report,
        )
        reading.run()
        h = reading.outputs(streams)
        if self.training and torch.is_grad_enabled():
            # Processes that train together wait for a gradient of every parameter, and a short
            # document recalls nothing.
            h = h + 0.0 * sum(p.sum() for p in self.memory.parameters())
        if report is not None:
            reading.tell(report)
        return h, self._of_rows(reading, streams, last) if want_state else None

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HMTState:
        """The empty past; takes no room, as no state grows beyond a segment's."""
        weight = self.embedding.weight
        return empty_state(
            batch_size,
            self.d_model,
            self.memory.recent_len,
            torch.device(device or weight.device),
            dtype or weight.dtype,
        )

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Memories, the open segment's past, prompt, recent tokens and four numbers of a row."""
        memory = self.memory
        closed = max(0, length - 1) // memory.segment_len
        vectors = 1 + min(closed, memory.max_memories) * (memory.kind != "off")
        own = vectors * self.d_model * self.embedding.weight.element_size()
        numbers = 8 * (memory.recent_len + 4)
        read = self._window(closed, length - closed * memory.segment_len, closes=False)
        past = self.backbone.state_bytes(batch_size, read) if length else 0
        return batch_size * (own + numbers) + past

    def flops(self, batch_size: int, length: int) -> int:
        """See TokenModel."""
        memory = self.memory
        L = memory.segment_len
        total = 2 * batch_size * length * self.d_model * self.vocab_size
        ends = range(0, length, L)
        for n, begin in enumerate(ends):
            count, closes = min(L, length - begin), begin + L < length
            window = self._window(n, count, closes)
            total += self.backbone.hidden_flops(batch_size, window)
        asking = [n for n in range(len(ends)) if memory.asks(n)]
        if asking:
            width = memory.summary_len
            if memory.query == "current_prefix":
                width = max(min(width, length - n * L) for n in asking)
            rows = batch_size * len(asking)
            held = batch_size * sum(min(n, memory.max_memories) for n in asking)
            total += self.backbone.hidden_flops(rows, width + 2)
            total += memory.recall.flops(rows) + 4 * held * self.d_model
        return total

    def _window(self, index: int, count: int, closes: bool) -> int:
        """Positions that the backbone reads for `count` tokens of segment `index`."""
        sensory = self.memory.sensory_len if index else 0
        embeddings = 0 if self.memory.kind == "off" else 1 + closes
        return embeddings + sensory + count

    def _check_input(
        self,
        tokens: Tensor,
        state: Any,
        segments: Tensor | None,
        prefix_len: Tensor | None,
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (B, T), T >= 1")
        if state is not None and not isinstance(state, HMTState):
            raise ValueError(f"state is of type {type(state).__name__}; expected HMTState or None")
        if state is not None and len(state.segment) != len(tokens):
            raise ValueError(
                f"state has {len(state.segment)} rows; expected those of tokens, {len(tokens)}"
            )
        if prefix_len is not None and self.backbone.causal == "prefix":
            raise ValueError(
                "prefix_len with memory=hmt: a segment is read in one direction; use memory=none"
            )
        if segments is None:
            return
        if not self.supports_segments:
            raise ValueError("segments: the backbone has a mixer that does not support them")
        if segments.shape != tokens.shape or segments.dtype.is_floating_point:
            raise ValueError(
                f"segments is {segments.dtype} {tuple(segments.shape)}; "
                f"expected integers {tuple(tokens.shape)}"
            )

    def _of_rows(self, reading: Reading, streams: Streams, last: Tensor) -> HMTState:
        """The state of the rows, each of which ends in its last stream and the document `last`."""
        state = reading.state()
        if streams.packing is None:
            return replace(state, segment=last)
        state = replace(select_batch(state, streams.packing.last), segment=last)
        # A document before the last may have had more memories.
        held = int(state.closed.max().clamp(max=self.memory.max_memories))
        spare = state.memories.shape[1] - held
        return replace(state, memories=state.memories[:, spare:]) if spare > 0 else state


def _of_streams(state: HMTState, streams: Streams) -> HMTState:
    """The past of every stream: its row's, or none where it is another document."""
    if streams.packing is None:
        return state
    past = select_batch(state, streams.packing.row)
    carried = streams.packing.carried
    return replace(
        past,
        memories=keep_rows(carried, past.memories),
        closed=keep_rows(carried, past.closed),
        offset=keep_rows(carried, past.offset),
        recent=keep_rows(carried, past.recent),
        prompt=keep_rows(carried, past.prompt),
    )
