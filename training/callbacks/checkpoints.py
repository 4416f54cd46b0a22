"""When checkpoints are written, and what they hold besides the trainer's own state."""

import math
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from records.checkpoints import Best, CheckpointStore, read_checkpoint, write_checkpoint
from training.callbacks.metrics import Metrics
from training.callbacks.signals import StopSignals
from training.rng import generator_states, seed_generators, set_generator_states


class VerifiedCheckpointIO(CheckpointIO):
    """Writes checkpoints atomically with a checksum, checks it when reading, runs no code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(  # type: ignore[override]
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Saves after every `every` steps, after the last, on a new best validation and on a signal.

    A checkpoint is only ever written between two steps, when every step so far was finite, and
    after the step's row of metrics is on the disk. It holds the states of the global generators of
    every process, and the first batch after a resume begins with them. That of a new run begins
    with those there were when this was made, in the first process, and with others in the others:
    where there are several, Lightning seeds them all alike in between.

    Args:
        store: where checkpoints are kept.
        metrics: has the row of the step; must stand before this callback.
        signals: what may ask the run to stop.
        every: steps.
        keep: how many checkpoints stay, besides the best.
        metric: column of the row that says which step is best.
        higher_is_better: or lower.
    """

    def __init__(
        self,
        store: CheckpointStore,
        metrics: Metrics,
        signals: StopSignals,
        *,
        every: int,
        keep: int,
        metric: str,
        higher_is_better: bool,
    ) -> None:
        self.store = store
        self.metrics = metrics
        self.signals = signals
        self.every = every
        self.keep = keep
        self.metric = metric
        self.sign = 1 if higher_is_better else -1
        self.best: Best | None = None
        self.step = 0
        self._generators: list[dict[str, Any]] | None = None
        self._begun = False
        self._own = generator_states()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._begun:
            return
        self._begun = True
        if self._generators is not None and trainer.global_rank < len(self._generators):
            set_generator_states(self._generators[trainer.global_rank])
        elif trainer.global_rank == 0:
            set_generator_states(self._own)
        else:
            seed_generators(torch.initial_seed() + trainer.global_rank)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:  # between the micro-batches of one step
            return
        self.step = trainer.global_step
        improved = self._improved()
        stop = trainer.strategy.reduce_boolean_decision(self.signals.received, all=False)
        due = self.step % self.every == 0 or self.step == trainer.max_steps
        if due or improved or stop:
            with self.metrics.paused():
                self._save(trainer)
        if stop:
            trainer.should_stop = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states: list[Any] = [generator_states()]
        if trainer.world_size > 1:
            states *= trainer.world_size
            torch.distributed.all_gather_object(states, generator_states())
        checkpoint["generators"] = states

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._generators = checkpoint["generators"]

    def state_dict(self) -> dict[str, Any]:
        return {"best": None if self.best is None else self.best._asdict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best"]
        self.best = None if best is None else Best(**best)

    def _improved(self) -> bool:
        value = self.metrics.row.get(self.metric)
        if value is None or math.isnan(value):
            return False
        if self.best is not None and self.sign * value <= self.sign * self.best.value:
            return False
        self.best = Best(self.step, self.metric, value)
        return True

    def _save(self, trainer: Trainer) -> None:
        self.metrics.meter.check()
        if self.metrics.file is not None:
            self.metrics.file.sync()
        trainer.save_checkpoint(self.store.path(self.step))
        if trainer.is_global_zero:
            self.store.mark_best(self.best)
            self.store.prune(self.keep)
