"""The parameters and options of segment memory, and the memory embedding that a segment reads.

R rows, C memories, D model width, L tokens of a segment, N memories kept.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from layers.marks import mark
from layers.memory_recall import MemoryRecall
from models.language_model import LanguageModel

Kind = Literal["hierarchical", "recurrent", "off"]
Query = Literal["previous_tail", "current_prefix"]


class SegmentMemory(nn.Module):
    """What HMT adds to its backbone; see HMT for the arguments.

    Parameters, those of `summary_prompt` and `recall` in the hierarchical kind only, and
    `initial_memory` unless the kind is off:
        summary_prompt: (D,) T, stands at both ends of what is summarised.
        initial_memory: (D,) m_0, the first segment's memory embedding.
        recall: MemoryRecall.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        *,
        segment_len: int,
        summary_len: int | None,
        sensory_len: int,
        max_memories: int,
        recall_dim: int | None,
        query: Query,
        kind: Kind,
        bptt_depth: int | None,
    ) -> None:
        super().__init__()
        d_model = embedding.embedding_dim
        self.d_model = d_model
        self.segment_len = segment_len
        self.summary_len = max(1, round(segment_len / 2)) if summary_len is None else summary_len
        self.sensory_len = sensory_len
        self.max_memories = max_memories
        self.query = query
        self.kind = kind
        self.bptt_depth = bptt_depth
        self._check(d_model if recall_dim is None else recall_dim)
        if kind != "off":
            self.initial_memory = nn.Parameter(_like(embedding))
            mark(self, "initial_memory", decay=False, own_init=True)
        if kind == "hierarchical":
            self.summary_prompt = nn.Parameter(_like(embedding))
            mark(self, "summary_prompt", decay=False, own_init=True)
            self.recall = MemoryRecall(d_model, d_model if recall_dim is None else recall_dim)

    def _check(self, recall_dim: int) -> None:
        length = self.segment_len
        if length < 1:
            raise ValueError(f"segment_len={length}: expected at least 1")
        if not 1 <= self.summary_len <= length:
            raise ValueError(
                f"summary_len={self.summary_len}: allowed: 1 to segment_len={length}, or null"
            )
        if not 0 <= self.sensory_len <= length:
            raise ValueError(f"sensory_len={self.sensory_len}: allowed: 0 to segment_len={length}")
        if self.max_memories < 1:
            raise ValueError(f"max_memories={self.max_memories}: expected at least 1")
        if recall_dim < 1:
            raise ValueError(f"recall_dim={recall_dim}: expected at least 1, or null")
        if self.bptt_depth is not None and self.bptt_depth < 1:
            raise ValueError(f"bptt_depth={self.bptt_depth}: expected at least 1, or null")
        for name, choices in (("query", Query), ("kind", Kind)):
            if getattr(self, name) not in choices.__args__:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: allowed: {', '.join(choices.__args__)}"
                )

    @property
    def recent_len(self) -> int:
        """Tokens of the past that the next segment reads again."""
        looks_back = self.kind == "hierarchical" and self.query == "previous_tail"
        return max(self.sensory_len, self.summary_len if looks_back else 0)

    @property
    def leak_reason(self) -> str:
        """Where a segment's own tokens choose what it recalls, in one line; else empty."""
        j = self.summary_len
        if self.kind != "hierarchical" or self.query != "current_prefix" or j == 1:
            return ""
        return (
            f"memory.query=current_prefix: the first {j} tokens of a segment choose what it "
            f"recalls, which logits at its offsets 0 to {j - 2} see"
        )

    def asks(self, index: int) -> bool:
        """Whether segment `index` needs a summary: of a single memory there is no choice."""
        return self.kind == "hierarchical" and min(index, self.max_memories) > 1

    def summarise(
        self, backbone: LanguageModel, ids: Tensor, lengths: list[int] | None = None
    ) -> Tensor:
        """S = the last hidden state of BB([T ; E(ids) ; T]).

        Args:
            ids: (R, J) tokens.
            lengths: how many of them belong to each row; None: all.

        Returns:
            (R, D).
        """
        R, J = ids.shape
        ends = self.summary_prompt.expand(R, 1, -1)
        x = torch.cat([ends, backbone.embed(ids), ends], dim=1)
        if lengths is None or min(lengths) == J:
            h, _ = backbone.read(x)
            return h[:, -1]
        end = torch.tensor(lengths, device=ids.device)[:, None] + 1  # (R, 1)
        where = torch.arange(J + 2, device=ids.device)
        x = torch.where((where == end)[..., None], self.summary_prompt, x)
        # What stands behind the end is marked only for a backbone that would look at it.
        marks = torch.where(where <= end, 0, -1) if backbone.causal == "leaky" else None
        h, _ = backbone.read(x, segments=marks)
        return h[torch.arange(R, device=ids.device), end[:, 0]]

    def embedding(
        self, index: list[int], memories: Tensor, queries: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """P, the memory embedding of a segment of every row.

        Args:
            index: number of each row's segment.
            memories: (R, C, D), newest last.
            queries: (R, D) of `recall.queries`, where any row asks; zeros in rows that do not.

        Returns:
            P (R, D), and the weights (R, C) of what was recalled, None without a query.
        """
        if not any(index):
            return self.initial_memory.expand(len(index), -1), None
        weights = None
        if queries is None:
            prompt = memories[:, -1]
        else:
            held = [min(n, self.max_memories) or memories.shape[1] for n in index]
            alike = min(held) == memories.shape[1]
            own = None if alike else torch.tensor(held, device=memories.device)
            prompt, weights = self.recall(queries, memories, own)
        if not all(index):
            first = torch.tensor([n == 0 for n in index], device=memories.device)
            prompt = torch.where(first[:, None], self.initial_memory, prompt)
        return prompt, weights


def _like(embedding: nn.Embedding) -> Tensor:
    """(D,) as large as an embedded token, as the public code draws it."""
    weight = embedding.weight.detach()
    return torch.randn_like(weight[0]) * weight.std()
