"""What one forward pass has to say besides its output: auxiliary losses and statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Report:
    """Collects auxiliary losses and statistics of one forward pass, by layer.

    A mixer calls `report.loss(name, value)` with a scalar that takes part in the training loss
    and `report.stat(name, value)` with anything worth logging. `report=None` asks for neither, so
    a mixer computes these only when it is handed a report.
    """

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.stats: dict[str, Tensor] = {}
        self._prefix = ""

    def loss(self, name: str, value: Tensor) -> None:
        """Record a scalar loss; the trainer adds it to the objective with its own weight."""
        self.losses[self._prefix + name] = value

    def stat(self, name: str, value: Tensor | float) -> None:
        """Record a statistic; it never carries a gradient."""
        self.stats[self._prefix + name] = torch.as_tensor(value).detach()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix every name recorded inside with `name/`."""
        outer, self._prefix = self._prefix, f"{self._prefix}{name}/"
        try:
            yield
        finally:
            self._prefix = outer
