"""Progress on the console: a bar on a terminal, else a line now and then."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.callbacks.metrics import VALIDATION, Metrics

SECONDS_BETWEEN_LINES = 2.0


class ShowProgress(Callback):
    """Steps done, loss, tokens per second and the last validation.

    Without a terminal a line is printed for a row with a validation, and for other rows when two
    seconds have passed since the last line.
    """

    def __init__(self, metrics: Metrics, console: Console) -> None:
        self.metrics = metrics
        self.console = console
        self.text = ""
        self._bar: Progress | None = None
        self._printed = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = self.metrics.row
        if row and trainer.is_global_zero:
            self._say(trainer, row)
        if not (self.console.is_terminal and trainer.is_global_zero):
            return
        bar = self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, text="")
        bar.start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        row = self.metrics.row
        if self._bar is not None:
            self.text = describe(row) or self.text
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, text=self.text)
        elif trainer.is_global_zero and row and (self._validated(row) or self._due()):
            self._say(trainer, row)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _say(self, trainer: Trainer, row: dict[str, float]) -> None:
        self._printed = time.monotonic()
        self.console.print(f"step {trainer.global_step}/{trainer.max_steps}  {describe(row)}")

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _due(self) -> bool:
        return time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES

    @staticmethod
    def _validated(row: dict[str, float]) -> bool:
        return any(name.startswith(VALIDATION) for name in row)


def describe(row: dict[str, float]) -> str:
    """The figures of a row that are worth watching."""
    parts = []
    if "train/loss" in row:
        parts.append(f"loss {row['train/loss']:.4f}")
    if "train/tokens_per_second" in row:
        parts.append(f"{row['train/tokens_per_second']:,.0f} tokens/s")
    parts += [
        f"{name.replace('/', ' ')} {value:.4f}"
        for name, value in row.items()
        if name.startswith(VALIDATION) and name.count("/") == 1  # not those of single slices
    ]
    return "  ".join(parts)
