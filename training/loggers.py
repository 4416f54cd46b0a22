"""Loggers beside metrics.csv, through Lightning's classes."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from records.folder import RunFolder
from records.points import SWEEP

# What runs of one configuration under several seeds do not have in common.
_OF_ONE_RUN = ("seed", "run_dir", "resume", "data", "logger", "callbacks")
LONGEST_TAG = 64  # of wandb


@contextmanager
def loggers_of(cfg: DictConfig, folder: RunFolder, step: int) -> Iterator[list[Logger]]:
    """What `cfg.logger` describes, if anything, writing into the run folder from `step` on.

    Runs that differ in their seed are one group of Weights & Biases, unless logger.group names
    another; those of a sweep have its name as a tag.
    """
    target = cfg.logger.get("_target_")
    if target is None:
        yield []
        return
    kind = get_class(target)
    own = _continued(kind, folder, step)
    if issubclass(kind, WandbLogger):
        own["group"] = cfg.logger.group or _group(cfg)
        sweep = os.environ.get(SWEEP)
        own["tags"] = [*cfg.logger.tags, *([f"sweep:{sweep}"[:LONGEST_TAG]] if sweep else [])]
    logger: Logger = instantiate(cfg.logger, save_dir=str(folder.path), **own)
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


def whereabouts(logger: Logger) -> dict[str, Any]:
    """Where to look for what `logger` wrote, for the record."""
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        place = {"url": run.url} if run.url else {"folder": str(Path(run.dir).parent)}
        return {"kind": "wandb", "id": run.id, "group": run.group, "tags": list(run.tags), **place}
    return {"kind": type(logger).__name__, "folder": logger.save_dir}


def _group(cfg: DictConfig) -> str:
    """The same for runs that differ in their seed alone."""
    pattern = cfg.pattern if isinstance(cfg.pattern, str) else "-".join(cfg.pattern)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    own = {key: value for key, value in plain.items() if key not in _OF_ONE_RUN}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
    return f"{pattern[:LONGEST_TAG]}-{digest}"
