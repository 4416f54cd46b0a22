"""Sums over the micro-batches between two rows of metrics."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.errors import TrainingError
from training.module import Training
from training.optim import ParameterGroups

NEVER = torch.iinfo(torch.int64).max


class Meter:
    """Means of the losses, tokens and time since the last row, kept on the device until asked for.

    Its state goes into checkpoints, so that the row after a resume is the mean over the same
    micro-batches as in a run that was never interrupted.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.batches = 0
        self.tokens: Tensor | int = 0
        self.seconds = 0.0
        self.first_bad: Tensor | int = NEVER  # step of the first loss or gradient not finite
        self.norms: Tensor | None = None  # of the gradients of that step
        self.names: list[str] = []  # of the parameters they belong to
        self.groups: dict[str, Mapping[str, Tensor]] = {}  # parameters as the optimizer has them

    def add(self, module: Training, seconds: float) -> None:
        """Count the micro-batch that `module` has just seen, which took `seconds`."""
        for name, value in module.loss.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.batches += 1
        self.tokens += module.tokens
        self.seconds += seconds

    def watch(self, module: Training, step: int) -> None:
        """Note `step` if its loss or gradient is not finite, without waiting for the device."""
        finite = module.gradient_norm.isfinite() & module.loss["loss"].isfinite()
        norms = module.gradient_norms
        is_first = ~finite & (self.first_bad == NEVER)
        self.norms = norms if self.norms is None else torch.where(is_first, norms, self.norms)
        if not self.names:
            self.names = list(module.gradient_names)
            groups = ParameterGroups.of(module.model)
            self.groups = {"weight decay": groups.decay, "no weight decay": groups.no_decay}
        bad = torch.where(finite, NEVER, step)
        self.first_bad = bad.clamp(max=self.first_bad)

    def check(self) -> None:
        """Return when every step so far was finite.

        Raises:
            TrainingError: names the first step that was not, and the parameters concerned.
        """
        if int(self.first_bad) != NEVER:
            raise TrainingError(
                f"step {int(self.first_bad)}: loss or gradient is not finite{self._where()}"
            )

    def _where(self) -> str:
        """How many gradients of each parameter group were not finite, with the first one's name."""
        if self.norms is None:
            return ""
        finite = self.norms.isfinite().tolist()
        bad = [name for name, good in zip(self.names, finite, strict=True) if not good]
        if not bad:
            return "; every single gradient is"
        counts = []
        for title, group in self.groups.items():
            concerned = sum(name in group for name in bad)
            if concerned:
                counts.append(f"{concerned} of {len(group)} tensors with {title}")
        return f": the gradients of {' and '.join(counts)}, the first {bad[0]}"

    def take(self) -> tuple[dict[str, float], int, float]:
        """(means of the losses, tokens, seconds) since the last call, and start again."""
        means = {name: float(value) / self.batches for name, value in self.sums.items()}
        tokens, seconds = int(self.tokens), self.seconds
        self.sums, self.batches, self.tokens, self.seconds = {}, 0, 0, 0.0
        return means, tokens, seconds

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "sums": {name: float(value) for name, value in self.sums.items()},
            "batches": self.batches,
            "tokens": int(self.tokens),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.sums = dict(state["sums"])
        self.batches = state["batches"]
        self.tokens = state["tokens"]
        self.seconds = state["seconds"]
