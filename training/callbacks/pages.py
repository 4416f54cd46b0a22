"""Page faults of the training steps, for the record."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from training.pages import page_faults

WARM_UP = 10  # micro-batches that fault in what is then kept


class CountPageFaults(Callback):
    """Counts what happens inside a micro-batch: not loading, validation or checkpoints."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self._batches = 0
        self._faults = 0
        self._before = 0

    @property
    def per_step(self) -> float | None:
        """Mean over the steps of this process; None when there were too few to say."""
        counted = self._batches - WARM_UP
        return self.accumulate * self._faults / counted if counted > 0 else None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._before = page_faults()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._batches += 1
        if self._batches > WARM_UP:
            self._faults += page_faults() - self._before
