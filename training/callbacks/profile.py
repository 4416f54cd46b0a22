"""Where the time of a few training batches goes."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity

from training.callbacks.metrics import Metrics


class Profile(Callback):
    """Records batches with torch.profiler: a table on the console, profile.json in the run folder.

    The file is a Chrome trace, for Perfetto or chrome://tracing.

    Args:
        wait: batches before the recording, which are slower than the rest.
        batches: batches that are recorded.
        rows: operators in the table, most expensive first.
    """

    def __init__(self, *, wait: int = 3, batches: int = 5, rows: int = 20) -> None:
        self.rows = rows
        self.schedule = torch.profiler.schedule(wait=wait, warmup=1, active=batches, repeat=1)
        self._profiler: torch.profiler.profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = next(each.folder for each in trainer.callbacks if isinstance(each, Metrics))  # type: ignore[attr-defined]
        device = pl_module.device.type

        def write(profiler: torch.profiler.profile) -> None:
            order = f"self_{device}_time_total"
            print(profiler.key_averages().table(sort_by=order, row_limit=self.rows))
            profiler.export_chrome_trace(str(folder.path / "profile.json"))

        activities = [ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities, schedule=self.schedule, on_trace_ready=write
        )
        self._profiler.start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
