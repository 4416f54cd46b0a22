"""Accuracy on recall tasks: what was predicted at the labelled positions, sequence by sequence.

B rows, T time, D model width, V vocabulary, N sequences of a slice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

from models.generation import evaluation_mode, generate
from models.interface import TokenModel
from tasks.base import IGNORED
from tasks.recall.task import RecallSlice

HEAD_ROWS = 4096  # labelled positions that the head reads at once: bounds the logits held


@dataclass(frozen=True)
class SliceScore:
    """Of every sequence, how many positions are labelled, `labels` (N,), and `right` (N,).

    `chance` is the accuracy of the task's guesser, `chance_of_vocabulary` of naming any possible
    answer. `length` are the positions of a sequence, `state_bytes` what the model holds of one
    after it.
    """

    name: str
    chance: float
    chance_of_vocabulary: float
    right: np.ndarray
    labels: np.ndarray
    length: int = 0
    state_bytes: int = 0

    @property
    def sequence_accuracy(self) -> float:
        """Mean over sequences of the share of labelled positions that are right."""
        return float(np.mean(self.right / self.labels))

    @property
    def token_accuracy(self) -> float:
        """Share of all labelled positions, whatever sequence they stand in."""
        return float(self.right.sum() / self.labels.sum())

    @property
    def exact_accuracy(self) -> float:
        """Share of sequences without a wrong position."""
        return float(np.mean(self.right == self.labels))

    def summary(self) -> dict[str, Any]:
        """Every figure of the slice; intervals hold 95% and treat sequences as independent.

        Both are Wilson's for N trials. A share of right positions lies between 0 and 1, so that
        its variance is at most that of a trial of the same mean, however the positions of a
        sequence hang together: the interval of `sequence_accuracy` is wide rather than narrow.
        """
        n = len(self.labels)
        return {
            "slice": self.name,
            "chance": self.chance,
            "chance_of_vocabulary": self.chance_of_vocabulary,
            "length": self.length,
            "state_bytes": self.state_bytes,
            "sequences": n,
            "positions": int(self.labels.sum()),
            "sequence_accuracy": self.sequence_accuracy,
            "sequence_accuracy_interval": list(wilson(self.sequence_accuracy, n)),
            "token_accuracy": self.token_accuracy,
            "exact_accuracy": self.exact_accuracy,
            "exact_accuracy_interval": list(wilson(self.exact_accuracy, n)),
        }


@torch.no_grad()
def score_slice(
    model: TokenModel, part: RecallSlice, batch_size: int = 8, chunk: int = 512
) -> SliceScore:
    """Read the examples of one slice, about `batch_size * chunk` tokens per pass.

    Examples longer than `chunk` are read in pieces, the states handed on, so that memory does not
    grow with their length under a model of bounded states; a leaky model reads them whole, and one
    that reads a prefix in both directions too.

    Raises:
        ValueError: a sequence without a label.
    """
    right, labels = [], []
    device = model.head_weight.device
    if part.answer_after is not None:
        return score_written(model, part, batch_size)
    length = part.inputs.shape[1]
    whole = model.causal == "leaky" or part.prefix_len is not None
    piece = length if whole else min(chunk, length)
    rows = max(1, batch_size * chunk // max(piece, 1))
    state_bytes = model.state_bytes(1, length)
    with evaluation_mode(model):
        for first in range(0, len(part.inputs), rows):
            inputs = torch.from_numpy(part.inputs[first : first + rows]).to(device)
            targets = torch.from_numpy(part.labels[first : first + rows]).to(device)
            asked = targets != IGNORED
            correct = torch.zeros_like(asked)
            state = model.new_state(len(inputs), length, device) if piece < length else None
            for begin in range(0, length, piece):
                here = slice(begin, begin + piece)
                more = begin + piece < length
                h, state = model.hidden(
                    inputs[:, here], state, prefix_len=_prefix(part, inputs), want_state=more
                )
                found = predict(model, h[asked[:, here]]) == targets[:, here][asked[:, here]]
                correct[:, here][asked[:, here]] = found
            right.append(correct.sum(dim=1).cpu().numpy())
            labels.append(asked.sum(dim=1).cpu().numpy())
    if not np.concatenate(labels).all():
        raise ValueError(f"slice {part.name!r} has a sequence without a label")
    return SliceScore(
        part.name,
        part.chance,
        part.chance_of_vocabulary,
        np.concatenate(right),
        np.concatenate(labels),
        length,
        state_bytes,
    )


@torch.no_grad()
def score_written(model: TokenModel, part: RecallSlice, batch_size: int = 8) -> SliceScore:
    """Let the model write a thought and an answer by itself; only the answer counts.

    Greedy, from the states alone; what the slice's environment says replaces the model's words. A
    sequence without an answer within the length of the longest example is wrong.
    """
    if part.context is None or part.answer_after is None:
        raise ValueError(f"slice {part.name!r} does not say where a model begins to write")
    begin, end = part.context + 1, part.answer_after
    device = model.head_weight.device
    right = []
    for first in range(0, len(part.inputs), batch_size):
        rows = slice(first, first + batch_size)
        prompt = torch.from_numpy(part.inputs[rows, :begin])
        written = generate(
            model,
            prompt.to(device),
            max_new_tokens=part.inputs.shape[1] - begin + 1,
            stop=lambda new: (new[:, :-1] == end).any(dim=1),
            supply=_supplied(part, prompt),
        ).cpu()
        right.append(answers(written.numpy(), end) == last_labels(part.labels[rows]))
    length = part.inputs.shape[1]
    return SliceScore(
        part.name,
        part.chance,
        part.chance_of_vocabulary,
        np.concatenate(right).astype(np.int64),
        np.ones(len(part.inputs), np.int64),
        length,
        model.state_bytes(1, length),
    )


def _supplied(part: RecallSlice, prompt: Tensor) -> Callable[[Tensor], Tensor] | None:
    """`part.environment` as `generate` asks it."""
    environment = part.environment
    if environment is None:
        return None
    return lambda new: torch.from_numpy(environment(torch.cat([prompt, new.cpu()], dim=1).numpy()))


def answers(written: np.ndarray, end: int) -> np.ndarray:
    """(N,): what stands behind the first `end` of every row (N, T), -1 where nothing does."""
    ended = written[:, :-1] == end
    place = np.argmax(ended, axis=1)
    return np.where(ended.any(axis=1), written[np.arange(len(written)), place + 1], -1)


def last_labels(labels: np.ndarray) -> np.ndarray:
    """(N,): the last label of every row (N, L) that is not ignored."""
    asked = labels != IGNORED
    place = labels.shape[1] - 1 - np.argmax(asked[:, ::-1], axis=1)
    return labels[np.arange(len(labels)), place]


def _prefix(part: RecallSlice, inputs: Tensor) -> Tensor | None:
    if part.prefix_len is None:
        return None
    return torch.full((len(inputs),), part.prefix_len, device=inputs.device)


def pooled(scores: Sequence[SliceScore], name: str = "all") -> SliceScore:
    """All sequences of several slices as one: chances are means, length and state the largest."""
    sizes = [len(score.labels) for score in scores]
    return SliceScore(
        name,
        float(np.average([score.chance for score in scores], weights=sizes)),
        float(np.average([score.chance_of_vocabulary for score in scores], weights=sizes)),
        np.concatenate([score.right for score in scores]),
        np.concatenate([score.labels for score in scores]),
        max(score.length for score in scores),
        max(score.state_bytes for score in scores),
    )


def predict(model: TokenModel, h: Tensor) -> Tensor:
    """The most likely token (N,) after hidden vectors (N, D)."""
    if not len(h):
        return torch.empty(0, dtype=torch.int64, device=h.device)
    parts = [
        nn.functional.linear(part, model.head_weight).argmax(-1) for part in h.split(HEAD_ROWS)
    ]
    return torch.cat(parts)


def wilson(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share seen in `n` trials."""
    z = float(norm.ppf(0.5 + level / 2))
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
