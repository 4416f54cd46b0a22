"""Loggers beside metrics.csv, through Lightning's classes."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.utils import get_class, instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from records.folder import RunFolder


@contextmanager
def loggers_of(cfg: DictConfig, folder: RunFolder, step: int) -> Iterator[list[Logger]]:
    """What `cfg.logger` describes, if anything, writing into the run folder from `step` on."""
    target = cfg.logger.get("_target_")
    if target is None:
        yield []
        return
    logger: Logger = instantiate(
        cfg.logger, save_dir=str(folder.path), **_continued(get_class(target), folder, step)
    )
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    try:
        yield [logger]
    finally:
        if isinstance(logger, WandbLogger):
            # Without it the next run of a sweep in this process would go on in the same wandb run.
            logger.experiment.finish()


def _continued(kind: type, folder: RunFolder, step: int) -> dict[str, Any]:
    """Arguments by which the logger of a resumed run goes on where the checkpoint was."""
    if issubclass(kind, WandbLogger):
        started = f"{folder.path.name} {folder.record()['started']}"
        return {"id": hashlib.sha256(started.encode()).hexdigest()[:12], "resume": "allow"}
    if issubclass(kind, TensorBoardLogger) and step > 0:
        return {"purge_step": step + 1}
    return {}
