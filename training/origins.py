"""Runs that another run starts from: whose weights it takes, and whose attention it imitates."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from models.restore import put_weights, read_weights, restore
from records.checkpoints import checksum
from records.folder import RunFolder
from schema.errors import ConfigError
from tasks.base import Task
from training.module import Training
from training.resume import Resumed
from training.rng import isolated_generators
from training.transfer_objective import AttentionTransfer


def start_from(
    module: Training, cfg: DictConfig, task: Task, resumed: Resumed | None
) -> dict[str, Any]:
    """Give the model its first weights and the objective its teacher, from the runs `cfg` names.

    A resumed run has weights of its own; its teacher must be the one it had.

    Returns:
        For the record: run, checkpoint and sha256 of "init_from" and "teacher", where there is
        one.

    Raises:
        ConfigError: a run is missing or does not fit.
    """
    objective, source = module.objective, cfg.get("init_from")
    transfers = isinstance(objective, AttentionTransfer)
    fresh = resumed is None or resumed.checkpoint is None
    origins = {}
    if transfers:
        run, checkpoint = _teacher(objective, source, resumed)
    if source is not None and fresh:
        origins["init_from"] = _init(module, source, task)
    if transfers:
        with _named("objective.teacher", run), isolated_generators():
            folder = RunFolder.open(run)
            teacher, path = restore(
                folder, checkpoint, folder.config(), task.vocab_size, task.facts()
            )
            objective.attach(module.model, teacher, copy=fresh and source is None)
        origins["teacher"] = _facts(run, path)
        if resumed is not None:
            _check_teacher(resumed, origins["teacher"])
    return origins


def _init(module: Training, source: str, task: Task) -> dict[str, Any]:
    with _named("init_from", source):
        weights = read_weights(RunFolder.open(source), "best", task.facts())
        put_weights(module.model, weights, task.facts())
    return _facts(source, weights.path)


def _teacher(
    objective: AttentionTransfer, source: str | None, resumed: Resumed | None
) -> tuple[str, str]:
    """Run folder and checkpoint of the teacher: the run's so far, as configured, or that of the
    run it starts from.
    """
    if resumed is not None:
        return _recorded(resumed.folder.record()["teacher"])
    if source is not None and objective.stage == 1:
        raise ConfigError(
            f"init_from={source} with objective.stage=1, which starts from the weights of "
            "objective.teacher; expected null"
        )
    if objective.teacher is not None:
        return objective.teacher, objective.teacher_checkpoint
    if source is None:
        raise ConfigError(
            "objective.teacher=null: stage 2 needs init_from=<the run of stage 1>, or a teacher "
            "to start from"
        )
    with _named("init_from", source):
        teacher = RunFolder.open(source).record().get("teacher")
    if teacher is None:
        raise ConfigError(
            f"init_from={source} is a run without a teacher; give objective.teacher=..., or "
            "objective=next_token to finetune without one"
        )
    return _recorded(teacher)


def _recorded(teacher: dict[str, Any]) -> tuple[str, str]:
    folder = RunFolder(Path(teacher["run"]))
    return teacher["run"], str(folder.checkpoints.folder / teacher["checkpoint"])


def _check_teacher(resumed: Resumed, found: dict[str, Any]) -> None:
    recorded = resumed.folder.record()["teacher"]
    if recorded["sha256"] != found["sha256"]:
        raise ConfigError(
            f"resume={resumed.folder.path}: the teacher is not the one the run began with; "
            f"expected {recorded['checkpoint']} with sha256 {recorded['sha256']}, "
            f"found {found['sha256']}"
        )


def _facts(run: str, checkpoint: Path) -> dict[str, Any]:
    return {
        "run": str(Path(run).resolve()),
        "checkpoint": checkpoint.name,
        "sha256": checksum(checkpoint),
    }


@contextmanager
def _named(key: str, value: str) -> Iterator[None]:
    """Say in front of what is wrong which option led there."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{key}={value}: {error}") from error
