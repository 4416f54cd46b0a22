"""Training proper: a module, its data and the callbacks under Lightning's Trainer."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import DictConfig
from rich.console import Console
from torch.utils.data import DataLoader

from models.restore import restore
from records.checkpoints import step_of
from records.folder import RunFolder
from training.callbacks.checkpoints import Checkpoints
from training.callbacks.metrics import VALIDATION, Metrics
from training.callbacks.pages import CountPageFaults
from training.callbacks.progress import ShowProgress
from training.callbacks.signals import StopSignals
from training.loggers import loggers_of, whereabouts
from training.memory import enough_memory
from training.module import Training
from training.scores import Criterion
from training.trainer import build_trainer, quiet


@dataclass(frozen=True)
class Fitted:
    """What is left of the training.

    Attributes:
        facts: for the record: steps, tokens, page_faults_per_step, and loggers where there are any.
        precision: makes the context that training ran its forward passes in.
    """

    facts: dict[str, Any]
    precision: Callable[[], AbstractContextManager]


def fit(
    module: Training,
    loader: DataLoader,
    folder: RunFolder,
    cfg: DictConfig,
    *,
    checkpoint: Path | None,
    validate: Callable[[], Mapping[str, float]],
    validate_first: bool,
    criterion: Criterion,
    signals: StopSignals,
    console: Console,
) -> Fitted:
    """Train until trainer.max_steps, or until a signal has come.

    Args:
        loader: starts with the batch that follows the checkpoint.
        folder: is written to by the first process only.
        cfg: of the whole run.
        checkpoint: to go on from; None starts at step 0.
        validate: scores the model as it is.
        validate_first: score it before the first step too.
        criterion: which of these scores says what is best.

    Raises:
        TrainingError: a loss or a gradient was not finite, or memory did not suffice.
    """
    settings = cfg.trainer
    step = 0 if checkpoint is None else step_of(checkpoint)
    metrics = Metrics(
        folder,
        step,
        validate,
        log_every=settings.log_every,
        validate_every=settings.validate_every,
        validate_first=validate_first,
    )
    checkpoints = Checkpoints(
        folder.checkpoints,
        metrics,
        signals,
        every=settings.checkpoint_every,
        keep=settings.keep_checkpoints,
        metric=VALIDATION + criterion.score,
        higher_is_better=criterion.higher_is_better,
    )
    pages = CountPageFaults(settings.accumulate)
    extra: list[Callback] = [instantiate(node) for node in cfg.callbacks.values()]
    # The order matters: the row of a step, then its checkpoint, then what is shown of it.
    callbacks = [pages, signals, metrics, checkpoints, ShowProgress(metrics, console), *extra]
    with quiet(), loggers_of(cfg, folder, step) as loggers:
        trainer = build_trainer(settings, callbacks, loggers)
        precision = trainer.precision_plugin.forward_context
        with enough_memory(module, loader, precision):
            trainer.fit(module, loader, ckpt_path=checkpoint)
        if settings.strategy == "fsdp" and trainer.is_global_zero:
            data = folder.record()["data"]  # this process has had a part of the network
            module.model, _ = restore(folder, "last", cfg, module.model.vocab_size, data)
        module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
        written = [whereabouts(logger) for logger in loggers]
    facts: dict[str, Any] = {
        "steps": trainer.global_step,
        "tokens": metrics.tokens,
        "page_faults_per_step": pages.per_step,
    }
    if written:
        facts["loggers"] = written
    return Fitted(facts, precision)
