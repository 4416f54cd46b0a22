"""A run from the outside: its folder, its record, and how it ends."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from layers.report import Report
from models.interface import TokenModel
from records.folder import RunFolder, new_path
from records.machine import command, git_commit, machine, versions
from records.process import is_first_process
from schema.errors import ConfigError
from tasks.base import Batch, Task
from training.callbacks.signals import Interrupted
from training.errors import TrainingError
from training.module import Training
from training.optim import ParameterGroups
from training.resume import Resumed, check_data, differences, reopen
from training.rng import isolated_generators

_WORKER = "DataLoader worker"  # how torch's message of a dead one begins


def rehearse(module: Training, loader: DataLoader) -> int:
    """Run the objective on one example and make the optimizer; T of the example.

    What a layer, the objective or the optimizer cannot do with this data comes to light here,
    before anything is written. The global generators are afterwards as before.

    Raises:
        ConfigError: one of them says what it does not allow.
    """
    example: Batch = loader.collate_fn([loader.dataset[0]])  # type: ignore[assignment]
    try:
        with isolated_generators(), torch.no_grad():
            module.objective(module.model, example, Report())
        module.configure_optimizers()
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return example["inputs"].shape[1]


def model_facts(model: TokenModel, length: int) -> dict[str, Any]:
    """Parameters; for one sequence of `length` tokens, forward FLOPs per token and state bytes."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "length": length,
        "flops_per_token": model.flops(1, length) / length,
        "state_bytes": model.state_bytes(1, length),
        "causal": model.causal,
        "leak_reason": model.leak_reason,
    }


def describe(model: TokenModel, facts: dict[str, Any]) -> str:
    """The model and its parameter groups in three lines."""
    return (
        f"model: {facts['parameters']:,} parameters; of a sequence of {facts['length']} tokens "
        f"{facts['flops_per_token']:,.0f} FLOPs per token forward, {facts['state_bytes']:,} bytes "
        f"of state\n{ParameterGroups.of(model).describe()}"
    )


def open_folder(
    cfg: DictConfig,
    resumed: Resumed | None,
    task: Task,
    facts: dict[str, Any],
    extra: dict[str, Any],
) -> RunFolder:
    """The folder of the run: the resumed one, or a new one with its configuration and record.

    Args:
        facts: of the model, for the record.
        extra: further entries of the record: the runs it starts from, its budget.

    Raises:
        ConfigError: the resumed run was trained on other data, or run_dir is taken.
    """
    if resumed is not None:
        check_data(resumed.folder, task.facts())
        return resumed.folder
    if not is_first_process():
        return RunFolder(Path())  # is never written to
    pattern = cfg.pattern if isinstance(cfg.pattern, str) else "-".join(cfg.pattern)
    path = new_path(task.name, pattern) if cfg.run_dir is None else Path(cfg.run_dir).expanduser()
    record = {
        "command": command(),
        "seed": cfg.seed,
        "git": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "data": task.facts(),
        "model": facts,
        **extra,
    }
    return RunFolder.create(path, cfg, record)


@contextmanager
def recorded(
    folder: RunFolder, resumed: Resumed | None, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The time in which a run writes: whatever ends the block, the record says how.

    Yields:
        Entries of the record, for the block to fill in.

    Raises:
        ConfigError: another process is training this run.
        TrainingError: the disk is full, or a data worker was killed.
        SystemExit: a signal stopped the run, which is no failure: 0 for SIGTERM, 130 for Ctrl-C.
    """
    entries: dict[str, Any] = {}
    if not is_first_process():
        yield entries
        return
    with folder.locked():
        if resumed is not None:
            reopen(resumed)
            start = "no checkpoint, from the start" if resumed.step == 0 else f"step {resumed.step}"
            say(f"going on with {folder.path}: {start}")
            for line in differences(resumed.folder.record()):
                say(line)
        try:
            yield entries
        except Interrupted as interruption:
            folder.close("stopped", **entries)
            newest = folder.checkpoints.newest(say)
            where = "its start: there is no checkpoint yet" if newest is None else newest.name
            say(f"stopped; python train.py resume={folder.path} goes on from {where}")
            raise SystemExit(interruption.exit_code) from None
        except BaseException as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            with suppress(OSError):  # on a full disk the record stays "running", as after a kill
                folder.close("failed", error=message, **entries)
            told = _machines_fault(error, folder)
            if told is None:
                raise
            raise TrainingError(told) from error
        folder.close("finished", **entries)


def _machines_fault(error: BaseException, folder: RunFolder) -> str | None:
    """In a line, what no change of this program or of its options would mend; None for the rest."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "no space left on the disk"
    elif isinstance(error, RuntimeError) and _WORKER in str(error):
        what = "a data worker was killed"
    else:
        return None
    return f"{folder.path}: {what}; resume={folder.path} goes on from the last checkpoint"
