"""Lightning's Trainer as this project uses it: one endless epoch, counted in steps."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.utils.deterministic as deterministic_settings
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from kernels.precision import has_amx
from training.callbacks.checkpoints import VerifiedCheckpointIO
from training.pages import keep_freed_pages
from training.parallel import strategy_of

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16": "bf16-mixed"}

# Of Lightning's warnings, those that are about things this project does on purpose.
EXPECTED_WARNINGS = (
    "The 'train_dataloader' does not have many workers",  # the number is trainer.num_workers
    "Checkpoint directory .* exists",  # a resumed run writes beside its old checkpoints
    "The `srun` command is available",  # a run on one node of a cluster needs no srun
    r"`isinstance\(treespec, LeafSpec\)`",  # Lightning's own use of torch's pytree
)


def build_trainer(
    settings: DictConfig, callbacks: Sequence[Callback], loggers: Sequence[Logger]
) -> Trainer:
    """A Trainer without what callbacks of training.callbacks do in its place.

    Lightning's checkpoints, progress bar and validation loop are off, and so are its own ways to
    shard a sampler and to requeue a Slurm job, which would save a checkpoint beside ours.
    """
    plugins: list[Any] = [VerifiedCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    # Deterministic algorithms would fill fresh memory with NaN, at every step, to find errors in
    # operators; that is for tests.
    deterministic_settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=strategy_of(settings),
        precision=PRECISIONS[settings.precision],
        deterministic=settings.deterministic,
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip,
        callbacks=list(callbacks),
        logger=list(loggers),
        plugins=plugins,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )


def set_up_process(cfg: DictConfig) -> None:
    """Seed every global generator; set threads and pages as cfg.trainer asks.

    A precision of "auto" becomes the one that this machine is fast in, so that the run's own
    configuration names it.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.trainer.threads is not None:
        torch.set_num_threads(cfg.trainer.threads)
    if cfg.trainer.precision == "auto":
        on_cpu = cfg.trainer.accelerator == "cpu" or not torch.accelerator.is_available()
        low = has_amx() if on_cpu else True
        cfg.trainer.precision = "bf16" if low else "fp32"
    if cfg.trainer.keep_pages:
        keep_freed_pages()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's announcements and expected warnings from the console."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
