"""One call of HMT: the streams' segments, one after the other, all streams side by side.

S streams, R those that take part in a round, U tokens of the longest stream, C those of a round,
D model width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layers.report import Report
from layers.segments import NO_DOCUMENT
from layers.state import select_batch
from models.hmt.memory import SegmentMemory
from models.hmt.state import HMTState
from models.hmt.streams import Streams
from models.hmt.turns import Turn, idle, turns
from models.language_model import LanguageModel


class Reading:
    """Reads every stream to its end; `run` once, then `outputs`, `state` and `tell`.

    In a round each stream reads a segment, or the part of one that this call has:

        [P ; last tokens of the segment before ; tokens ; P]

    the first two where the segment opens, the last where it closes. All of the summaries that
    choose P are independent of memory and made before, in one call of the backbone.

    Rows that differ in a round are padded. Without a state to keep, a stream leaves when it has
    ended, and padding stands behind all tokens alone, where a causal backbone needs no marks.

    Args:
        past: of the streams.
        keep: whether the state after the call is wanted.
        report: see the mixer contract.
    """

    def __init__(
        self,
        backbone: LanguageModel,
        memory: SegmentMemory,
        streams: Streams,
        past: HMTState,
        *,
        keep: bool,
        report: Report | None,
    ) -> None:
        self.backbone = backbone
        self.memory = memory
        self.keep = keep
        self.report = report
        self.past = past
        self.device = streams.tokens.device
        began = torch.stack([past.offset, past.closed], dim=1).tolist()
        self.plans = [
            turns(length, offset, closed, memory.segment_len)
            for length, (offset, closed) in zip(streams.lengths, began, strict=True)
        ]
        self.history = torch.cat([past.recent, streams.tokens], dim=1)  # (S, W + U)
        self.lengths = streams.lengths
        # Of the streams that take part, `rows`:
        self.rows = list(range(len(self.plans)))
        self.memories = past.memories
        self.prompt = past.prompt
        self.number = past.number
        self.open = past.backbone
        # What was read, for `outputs` and `tell`:
        self.pieces: list[tuple[list[int], list[Turn], Tensor]] = []
        self.reports: list[tuple[Report, int]] = []
        self.recalled: list[Tensor] = []

    def run(self) -> None:
        """Read."""
        asked, queries = self._queries()
        for r in range(max(map(len, self.plans))):
            if not self.keep:
                self._dismiss(r)
            now = [
                self.plans[s][r] if r < len(self.plans[s]) else idle(self.plans[s])
                for s in self.rows
            ]
            if self.memory.kind != "off" and any(turn.opens for turn in now):
                self._choose(r, now, asked, queries)
            self._read(now)

    def outputs(self, streams: Streams) -> Tensor:
        """(B, T, D) of the call's tokens; zeros at padding."""
        packing = streams.packing
        cuts = {tuple(turn.count for turn in plan) for plan in self.plans}
        if packing is None and len(cuts) == 1:
            return torch.cat([piece for *_, piece in self.pieces], dim=1)
        address = np.zeros(streams.tokens.shape, dtype=np.int64)  # (S, U) into the flat pieces
        flat = [self.prompt.new_zeros(1, self.prompt.shape[1])]  # what padding reads
        base = 1
        for rows, now, piece in self.pieces:
            for i, (s, turn) in enumerate(zip(rows, now, strict=True)):
                first = base + i * piece.shape[1]
                address[s, turn.begin : turn.begin + turn.count] = first + np.arange(turn.count)
            base += piece.shape[0] * piece.shape[1]
            flat.append(piece.flatten(0, 1))
        where = torch.from_numpy(address).to(self.device)
        if packing is not None:
            where = where[packing.stream, packing.position]
            where = torch.where(packing.valid, where, 0)
        return torch.cat(flat)[where]

    def state(self) -> HMTState:
        """The past of the streams after the call; of no document that they end in."""
        closed = [sum(turn.closes for turn in plan) for plan in self.plans]
        ends = [plan[-1] if plan else idle(plan) for plan in self.plans]
        offset = self.past.offset + self._tensor([turn.count for turn in ends])
        opened = self._tensor([turn.opens for turn in ends])
        behind = self._tensor(self.lengths)[:, None]
        W = self.past.recent.shape[1]
        return HMTState(
            memories=self.memories,
            closed=self.past.closed + self._tensor(closed),
            offset=torch.where(opened, self._tensor([turn.count for turn in ends]), offset),
            recent=self.history.gather(1, behind + torch.arange(W, device=self.device)),
            prompt=self.prompt,
            backbone=self.open,
            number=self.number,
            segment=self.past.segment,
        )

    def tell(self, report: Report) -> None:
        """Report the means, over what was read, of what the layers report in each round.

        The statistic memory/recall_age says how many segments back recall looked in the mean.
        """
        total: dict[tuple[str, str], Tensor] = {}
        weight: dict[tuple[str, str], int] = {}
        for part, tokens in self.reports:
            for kind in ("losses", "stats"):
                for name, value in getattr(part, kind).items():
                    total[kind, name] = total.get((kind, name), 0) + tokens * value
                    weight[kind, name] = weight.get((kind, name), 0) + tokens
        for (kind, name), value in total.items():
            record = report.loss if kind == "losses" else report.stat
            record(name, value / weight[kind, name])
        if self.recalled:
            ages = [w @ torch.arange(w.shape[1], 0, -1.0).to(w) for w in self.recalled]
            report.stat("memory/recall_age", torch.cat(ages).mean())

    def _queries(self) -> tuple[dict[tuple[int, int], int], Tensor | None]:
        """What every segment that opens in this call asks of memory, (Q, D), and whose is where.

        The rows of one round stand together, by stream.
        """
        memory = self.memory
        found = [
            (r, s, plan[r])
            for r in range(max(map(len, self.plans)))
            for s, plan in enumerate(self.plans)
            if r < len(plan) and plan[r].opens and memory.asks(plan[r].index)
        ]
        if not found:
            return {}, None
        streams = self._tensor([s for _, s, _ in found])
        begins = self._tensor([turn.begin for *_, turn in found])
        begins = begins + self.past.recent.shape[1]  # in the history
        lengths = None
        width = memory.summary_len
        if memory.query == "current_prefix":
            lengths = [min(width, turn.count) for *_, turn in found]
            width = max(lengths)
        else:
            begins = begins - width
        ids = self._tokens(streams, begins, width)
        summaries = memory.summarise(self.backbone, ids, lengths)
        asked = {(r, s): i for i, (r, s, _) in enumerate(found)}
        return asked, memory.recall.queries(summaries)

    def _dismiss(self, r: int) -> None:
        """Go on with the streams that have a turn in round r."""
        stay = [i for i, s in enumerate(self.rows) if r < len(self.plans[s])]
        if len(stay) == len(self.rows):
            return
        index = self._tensor(stay)
        self.rows = [self.rows[i] for i in stay]
        self.open = select_batch(self.open, index)
        self.memories, self.prompt, self.number = (
            x.index_select(0, index) for x in (self.memories, self.prompt, self.number)
        )

    def _choose(
        self,
        r: int,
        now: Sequence[Turn],
        asked: dict[tuple[int, int], int],
        queries: Tensor | None,
    ) -> None:
        """The memory embedding P of every segment that opens in round r."""
        self._truncate(r)
        places = [(i, asked[r, s]) for i, s in enumerate(self.rows) if (r, s) in asked]
        own = None
        if places and queries is not None:
            first, last = places[0][1], places[-1][1]
            own = queries[first : last + 1]
            if len(places) < len(now):
                index = self._tensor([i for i, _ in places])
                own = own.new_zeros(len(now), own.shape[1]).index_copy(0, index, own)
        prompt, weights = self.memory.embedding([t.index for t in now], self.memories, own)
        if weights is not None and self.report is not None:
            self.recalled.append(weights.detach()[[i for i, _ in places]])
        opens = [turn.opens for turn in now]
        if not all(opens):
            prompt = torch.where(self._tensor(opens)[:, None], prompt, self.prompt)
        self.prompt = prompt

    def _truncate(self, r: int) -> None:
        """Cut the memories from what made them, every `bptt_depth` rounds before a stream's end."""
        depth = self.memory.bptt_depth
        if depth is None or not self.memories.requires_grad:
            return
        cut = self._tensor([(len(self.plans[s]) - r) % depth == 0 for s in self.rows])
        self.memories = torch.where(cut[:, None, None], self.memories.detach(), self.memories)

    def _read(self, now: list[Turn]) -> None:
        """Run the backbone over one round, and take the memories that it makes."""
        closes = [turn.closes for turn in now]
        parts, before = self._parts(now)
        # Without memory embeddings a segment that was full may close with nothing to read.
        h = self._backbone(parts, now) if parts else self.prompt[:, None][:, :0]
        width = max(turn.count for turn in now)
        self.pieces.append((self.rows, now, h[:, before : before + width]))
        if any(closes) and self.memory.kind != "off":
            self._remember(h[:, -1:], closes)

    def _backbone(self, parts: Sequence[tuple[Tensor, list[int]]], now: Sequence[Turn]) -> Tensor:
        """The hidden states of `parts`, after those of the segments that are open."""
        opens = [turn.opens for turn in now]
        past, marks = None if all(opens) else self.open, None
        alike = len({(turn.opens, turn.index > 0, turn.count, turn.closes) for turn in now}) == 1
        # Rows that all begin here differ at their ends alone, which nothing sees if the backbone
        # is causal, its state is not wanted and no layer reports on all positions.
        quiet = not self.keep and self.report is None and self.backbone.causal != "leaky"
        if not (alike or (all(opens) and quiet)):
            past = self.open
            self.number = self.number + self._tensor(opens)
            marks = self._marks([own for _, own in parts])
        elif all(opens):
            self.number = torch.zeros_like(self.number)
        report = None if self.report is None else Report()
        h, self.open = self.backbone.read(
            torch.cat([x for x, _ in parts], dim=1),
            past,
            segments=marks,
            want_state=self.keep and not all(turn.closes for turn in now),
            report=report,
        )
        if report is not None:
            self.reports.append((report, sum(turn.count for turn in now)))
        return h

    def _parts(self, now: Sequence[Turn]) -> tuple[list[tuple[Tensor, list[int]]], int]:
        """What the backbone reads, (R, ., D) each with how many positions are each row's own.

        Also, how many positions stand before the tokens.
        """
        parts: list[tuple[Tensor, list[int]]] = []
        embedded = self.memory.kind != "off"
        opens, closes = [turn.opens for turn in now], [turn.closes for turn in now]
        sensory = [self.memory.sensory_len * (t.opens and t.index > 0) for t in now]
        counts = [turn.count for turn in now]
        if embedded and any(opens):
            parts.append((self.prompt[:, None], [int(each) for each in opens]))
        rows = self._tensor(self.rows)
        begins = self._tensor([turn.begin for turn in now]) + self.past.recent.shape[1]
        for width, own, shift in ((max(sensory), sensory, max(sensory)), (max(counts), counts, 0)):
            if width:
                ids = self._tokens(rows, begins - shift, width)
                parts.append((self.backbone.embed(ids), own))
        before = sum(x.shape[1] for x, _ in parts) - max(counts)
        if embedded and any(closes):
            parts.append((self.prompt[:, None], [int(each) for each in closes]))
        return parts, before

    def _marks(self, owns: Sequence[list[int]]) -> Tensor:
        """Document numbers for the backbone: one a segment, -1 where a row has nothing."""
        valid = [
            torch.arange(max(own), device=self.device) < self._tensor(own)[:, None] for own in owns
        ]
        return torch.where(torch.cat(valid, dim=1), self.number[:, None], NO_DOCUMENT)

    def _remember(self, made: Tensor, closes: list[bool]) -> None:
        """Append the memories `made` (R, 1, D) in the rows that close a segment."""
        made = made.to(self.memories.dtype)
        grown = torch.cat([self.memories, made], dim=1)
        if self.keep and not all(closes):  # else the other rows are done
            same = torch.cat([torch.zeros_like(made), self.memories], dim=1)
            grown = torch.where(self._tensor(closes)[:, None, None], grown, same)
        self.memories = grown[:, -self.memory.max_memories :]

    def _tokens(self, streams: Tensor, begins: Tensor, width: int) -> Tensor:
        """(R, width) ids of the `streams` (R,) from the places `begins` (R,) of the history on."""
        index = begins[:, None] + torch.arange(width, device=self.device)
        return self.history[streams[:, None], index.clamp(max=self.history.shape[1] - 1)]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.device)
