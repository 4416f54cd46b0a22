"""Negative log-likelihood of whole documents under two protocols.

Windowed: a document is read in overlapping windows, each from the empty past, and every token is
counted in the first window that reaches it. Carried: a document is read once, in chunks, the
states handed on, so that every token has all of its document before it. Where one window covers
the document the two agree.

A model that may read a prefix in both directions is scored in windows behind that prefix: of what
it saw, it predicts nothing.

Rows of unlike length are padded at their ends, where a causal model cannot be reached by what
stands there, and a row whose document has ended leaves the batch: no pass needs document numbers.
A leaky model, which would see the padding, gets none.

With `earlier` the tokens whose pair the model has read before in what is before it now are also
summed apart (evaluation/ar_hits.py).

B rows, T time, D model width. Place i of a document of n + 1 ids stands for reading ids[i] and
predicting ids[i + 1], i = 0..n-1; ids[0], which starts the document, is read and never predicted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.perplexity import DocumentScore, TextScore
from evaluation.progress import Advance
from kernels.linear_cross_entropy import linear_nll
from layers.state import select_batch
from models.generation import evaluation_mode
from models.interface import TokenModel
from tasks.base import IGNORED, Document

FILLED = 0.75  # of a batch's longest row that every row has at least: a bound on padding


class Span(NamedTuple):
    """Places `begin`..`end` - 1 of a document are read, those from `counted` on are counted.

    The model knows of places from `reach` on, None standing for `begin`.
    """

    document: int
    begin: int
    counted: int
    end: int
    reach: int | None = None

    @property
    def length(self) -> int:
        """Places read."""
        return self.end - self.begin


@torch.no_grad()
def score_windowed(
    model: TokenModel,
    documents: Sequence[Document],
    *,
    window: int | None,
    stride: int | None = None,
    prefix: int = 0,
    batch_size: int = 8,
    earlier: Sequence[np.ndarray] | None = None,
    progress: Advance | None = None,
) -> TextScore:
    """Score every document in windows of `window` places that start `stride` apart.

    Args:
        model: is in evaluation mode for the call.
        documents: each is read alone.
        window: places per window; None reads every document as one window.
        stride: places from one window to the next, 1..window - prefix; None is half a window or,
            if less, `window - prefix`. A token has at least `window - stride` tokens of context
            where its document has as many.
        prefix: leading places of every window that the model may read in both directions. What
            they would predict they may have seen, so that the first `prefix` tokens of a document
            are not scored.
        batch_size: windows per forward pass.
        earlier: of every document, the place (n,) at which each of its pairs was last completed,
            see ar_hits.earlier_places; None does not look for them.
        progress: is told after every pass how many more tokens have been counted.

    Raises:
        ValueError: a window, stride, prefix or batch size out of its range, or an empty document.
    """
    documents, lengths = _read(documents)
    _check(batch_size=batch_size, window=window, stride=stride)
    if window is None and stride is not None:
        raise ValueError(f"stride={stride} without a window; give both or neither")
    size = window or max(lengths)
    if not 0 <= prefix < size:
        raise ValueError(f"prefix={prefix}; allowed: 0 to {size - 1}, less than the window")
    step = stride or max(1, min(size // 2, size - prefix))
    if step > size - prefix:
        raise ValueError(f"stride={step}; allowed: up to {size - prefix}, window less prefix")
    spans = [
        span
        for d, n in enumerate(lengths)
        if n > prefix
        for span in windows(d, n, size, step, prefix)
    ]
    if not spans:
        raise ValueError(f"prefix={prefix}: no document is longer, there is nothing to score")
    spans.sort(key=lambda span: -span.length)  # memory peaks in the first pass
    filled = 1.0 if model.causal == "leaky" else FILLED
    sums = _Sums.of(lengths, earlier)
    with evaluation_mode(model):
        for rows in _batches(spans, batch_size, filled):
            batch = _collate(documents, rows, earlier)
            inputs = batch.inputs.to(model.head_weight.device)
            opened = inputs.new_full((len(rows),), prefix) if prefix else None
            h, _ = model.hidden(inputs, prefix_len=opened)
            _count(sums, model, h, batch, progress)
    return TextScore(
        "windowed",
        _scores(documents, sums, prefix),
        window,
        None if window is None else step,
        prefix=prefix,
        sliced=earlier is not None,
    )


@torch.no_grad()
def score_carried(
    model: TokenModel,
    documents: Sequence[Document],
    *,
    chunk: int = 512,
    batch_size: int = 8,
    earlier: Sequence[np.ndarray] | None = None,
    progress: Advance | None = None,
) -> TextScore:
    """Score every document in chunks of `chunk` places, the states handed from chunk to chunk.

    Memory does not grow with the documents for a model of bounded states. Documents of like
    length are read side by side, by a leaky model one after the other.

    Raises:
        ValueError: a chunk or batch size below 1, or an empty document.
    """
    documents, lengths = _read(documents)
    _check(batch_size=batch_size, chunk=chunk)
    side_by_side = 1 if model.causal == "leaky" else batch_size
    order = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    sums = _Sums.of(lengths, earlier)
    with evaluation_mode(model):
        for first in range(0, len(order), side_by_side):
            _carry(model, documents, order[first : first + side_by_side], chunk, sums, progress)
    scores = _scores(documents, sums)
    return TextScore("carried", scores, chunk=chunk, sliced=earlier is not None)


def windows(
    document: int, length: int, window: int, stride: int, prefix: int = 0
) -> Iterator[Span]:
    """The windows over a document of `length` places: each counts what no earlier one reached.

    With stride <= window - prefix this lies behind the window's own prefix.
    """
    counted = prefix
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield Span(document, begin, counted, end)
        if end == length:
            return
        counted = end


class _Batch(NamedTuple):
    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T), IGNORED where a place is only read, and at padding
    documents: Tensor  # (B,)
    hits: Tensor  # bool (B, T), where a pair comes up again that the model has read


@dataclass(frozen=True)
class _Sums:
    """Nats (D,) of every document, in fp64, and nats and number of its AR hits."""

    nll: Tensor
    hit_nll: Tensor
    hits: Tensor
    earlier: Sequence[np.ndarray] | None

    @classmethod
    def of(cls, lengths: Sequence[int], earlier: Sequence[np.ndarray] | None) -> "_Sums":
        nll, hit_nll, hits = torch.zeros(3, len(lengths), dtype=torch.float64)
        return cls(nll, hit_nll, hits, earlier)


def _carry(
    model: TokenModel,
    documents: Sequence[Document],
    group: Sequence[int],
    chunk: int,
    sums: _Sums,
    progress: Advance | None,
) -> None:
    """Read the documents `group`, longest first, to their ends."""
    lengths = [len(documents[d].ids) - 1 for d in group]
    device = model.head_weight.device
    state = model.new_state(len(group), lengths[0], device)
    alive = len(group)
    for begin in range(0, lengths[0], chunk):
        rows = [
            # all of the document before the chunk is in the states
            Span(d, begin, begin, min(begin + chunk, n), reach=0)
            for d, n in zip(group, lengths, strict=True)
            if n > begin
        ]
        if len(rows) < alive:
            alive = len(rows)
            state = select_batch(state, torch.arange(alive, device=device))
        batch = _collate(documents, rows, sums.earlier)
        h, state = model.hidden(batch.inputs.to(device), state, want_state=True)
        _count(sums, model, h, batch, progress)


def _batches(spans: Sequence[Span], batch_size: int, filled: float) -> Iterator[list[Span]]:
    """`spans`, the longest first, in batches whose rows fill this share of their longest."""
    batch: list[Span] = []
    for span in spans:
        if batch and (len(batch) == batch_size or span.length < filled * batch[0].length):
            yield batch
            batch = []
        batch.append(span)
    yield batch


def _collate(
    documents: Sequence[Document], rows: Sequence[Span], earlier: Sequence[np.ndarray] | None
) -> _Batch:
    """Spans as rows, padded at the end to the longest."""
    longest = max(span.length for span in rows)
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    hits = torch.zeros_like(inputs, dtype=torch.bool)
    for b, span in enumerate(rows):
        ids = torch.as_tensor(documents[span.document].ids[span.begin : span.end + 1])
        inputs[b, : span.length] = ids[:-1]
        targets[b, span.counted - span.begin : span.length] = ids[1 + span.counted - span.begin :]
        if earlier is not None:
            places = torch.from_numpy(earlier[span.document][span.begin : span.end])
            hits[b, : span.length] = places >= (span.begin if span.reach is None else span.reach)
    return _Batch(inputs, targets, torch.tensor([span.document for span in rows]), hits)


def _count(
    sums: _Sums, model: TokenModel, h: Tensor, batch: _Batch, progress: Advance | None
) -> None:
    """Add the NLL of every counted place to its document; the head reads these places alone.

    The sums are made on the host: in fp64, and in an order that repeats, whatever the device.
    """
    chosen = batch.targets != IGNORED
    targets = batch.targets[chosen].to(h.device)
    nll = linear_nll(h[chosen.to(h.device)], model.head_weight, targets)
    owners = batch.documents[:, None].expand_as(chosen)[chosen]
    nats, hits = nll.cpu().double(), batch.hits[chosen].double()
    sums.nll.index_add_(0, owners, nats)
    if sums.earlier is not None:
        sums.hit_nll.index_add_(0, owners, nats * hits)
        sums.hits.index_add_(0, owners, hits)
    if progress is not None:
        progress(len(nll))


def _scores(
    documents: Sequence[Document], sums: _Sums, prefix: int = 0
) -> tuple[DocumentScore, ...]:
    columns = zip(
        documents, sums.nll.tolist(), sums.hits.tolist(), sums.hit_nll.tolist(), strict=True
    )
    return tuple(
        DocumentScore(
            d.title, nll, max(0, len(d.ids) - 1 - prefix), d.words, d.bytes, int(hits), hit_nll
        )
        for d, nll, hits, hit_nll in columns
    )


def _read(documents: Sequence[Document]) -> tuple[list[Document], list[int]]:
    """The documents, in memory from here on, and how many places each has."""
    read = list(documents)
    if not read:
        raise ValueError("documents: none given; expected at least one")
    lengths = [len(document.ids) - 1 for document in read]
    for document, length in zip(read, lengths, strict=True):
        if length < 1:
            raise ValueError(f"document {document.title!r}: no token after the one it starts with")
    return read, lengths


def _check(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}; expected at least 1")
