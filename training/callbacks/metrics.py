"""Rows of metrics: to metrics.csv, to the loggers and to whoever shows progress."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from records.folder import RunFolder
from records.metrics import MetricsFile
from training.callbacks.meter import Meter
from training.module import Training
from training.rng import isolated_generators

VALIDATION = "validation/"  # in front of the scores of the validation split, as columns


class Metrics(Callback):
    """After every `log_every` steps what training measured, after every `validate_every` steps
    what `validate` returns, and both after the last step; one row per step.

    Columns: step; tokens (read so far); train/loss (mean over the micro-batches since the last
    row, each counting equally) and train/<part> where the loss has parts; train/gradient_norm and
    train/lr (of the last update); train/tokens_per_second (data loading included, validation and
    checkpoints not); layer/<statistic>; validation/<metric>.

    Validation leaves the global generators as they were, so that validating more or less often
    changes nothing in training.

    Args:
        folder: of the run; the first process appends the rows to its metrics.csv.
        after_step: where the run goes on: later rows are dropped.
        validate: scores the model.
        log_every: steps.
        validate_every: steps.
        validate_first: also before the first step, as the row of step 0.
    """

    def __init__(
        self,
        folder: RunFolder,
        after_step: int,
        validate: Callable[[], Mapping[str, float]],
        *,
        log_every: int,
        validate_every: int,
        validate_first: bool = False,
    ) -> None:
        self.folder = folder
        self.after_step = after_step
        self.file: MetricsFile | None = None
        self.validate = validate
        self.log_every = log_every
        self.validate_every = validate_every
        self.validate_first = validate_first
        self.meter = Meter()
        self.step = 0
        self.tokens = 0
        self.row: dict[str, float] = {}  # of the step just done; empty when it has none
        self._clock = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Training) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            self.file = self.folder.open_metrics(self.after_step)
        self.step = trainer.global_step
        if self.validate_first and self.step == 0:
            self._begin(trainer)
        self._clock = time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: Training, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.meter.add(pl_module, now - self._clock)
        self._clock = now
        self.row = {}
        if trainer.global_step == self.step:  # between the micro-batches of one step
            return
        self.step = trainer.global_step
        self.meter.watch(pl_module, self.step)
        last = self.step == trainer.max_steps
        if last or self.step % self.log_every == 0:
            self.row |= self._measured(trainer, pl_module)
        if last or self.step % self.validate_every == 0:
            self.row |= self._validated(trainer)
        if self.row:
            self._write(trainer)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time does not count as training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "meter": self.meter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]
        self.meter.load_state_dict(state_dict["meter"])

    def _begin(self, trainer: Trainer) -> None:
        """The row of step 0, unless it is there from an earlier start of the run."""
        self.row = self._validated(trainer)
        if self.file is None or self.file.last_step < 0:
            self._write(trainer)

    def _measured(self, trainer: Trainer, module: Training) -> dict[str, float]:
        self.meter.check()
        losses, tokens, seconds = self.meter.take()
        if trainer.world_size > 1:
            reduce, device = trainer.strategy.reduce, module.device
            tokens = int(reduce(torch.tensor(tokens, device=device), reduce_op="sum"))
            losses = {n: float(reduce(torch.tensor(v, device=device))) for n, v in losses.items()}
        self.tokens += tokens
        row: dict[str, float] = {"tokens": self.tokens}
        row |= {f"train/{name}": value for name, value in losses.items()}
        row["train/gradient_norm"] = float(module.gradient_norm)
        row["train/lr"] = module.lr
        row["train/tokens_per_second"] = tokens / seconds
        for name, value in module.report.stats.items():
            row[f"layer/{name}"] = float(value)
        return row

    def _validated(self, trainer: Trainer) -> dict[str, float]:
        self.meter.check()
        with self.paused(), isolated_generators(), trainer.precision_plugin.forward_context():
            scores = self.validate()
        return {VALIDATION + name: value for name, value in scores.items()}

    def _write(self, trainer: Trainer) -> None:
        with self.paused():
            if self.file is not None:
                self.file.append(self.step, self.row)
            for logger in trainer.loggers:
                logger.log_metrics(self.row, self.step)
