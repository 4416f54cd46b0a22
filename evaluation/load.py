"""A trained model from the folder of its run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from models.build import build_model
from models.interface import TokenModel
from records.checkpoints import DamagedCheckpoint, read_checkpoint
from records.folder import RunFolder
from schema.errors import ConfigError
from tasks.base import Task

WEIGHTS = "model."  # what the names of the network's tensors in a checkpoint start with


@dataclass(frozen=True)
class Trained:
    """A model, the prepared task it was trained on, and the checkpoint its weights are from."""

    model: TokenModel
    task: Task
    checkpoint: Path


def load(folder: RunFolder, checkpoint: str, cfg: DictConfig, device: torch.device) -> Trained:
    """The model of a run with the weights of one of its checkpoints, on `device`.

    Args:
        checkpoint: "best" (by validation; the last where nothing was validated), "last", or the
            path of a file.
        cfg: of the run. Its task is read again, for the tokeniser.

    Raises:
        ConfigError: no such checkpoint, a damaged one, or one of another network or tokeniser.
    """
    path = find_checkpoint(folder, checkpoint)
    try:
        weights = read_checkpoint(path)["state_dict"]
    except DamagedCheckpoint as error:
        raise ConfigError(f"checkpoint={checkpoint}: {error}") from error
    task: Task = instantiate(cfg.task)
    task.check()
    task.prepare()
    _check_tokenizer(folder, task)
    try:
        model = build_model(cfg, task.vocab_size)
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"run={folder.path} was made by another version: {said}") from error
    own = {name.removeprefix(WEIGHTS): w for name, w in weights.items() if name.startswith(WEIGHTS)}
    name = next(n for n, p in model.named_parameters() if p is model.embedding.weight)
    found, expected = len(own.get(name, ())), len(model.embedding.weight)
    if found != expected:
        raise ConfigError(
            f"checkpoint={path} has a vocabulary of {found} ids; "
            f"the run's own, with task={task.name}, has {expected}"
        )
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"checkpoint={path} is of another network: {said}") from None
    return Trained(model.to(device), task, path)


def find_checkpoint(folder: RunFolder, checkpoint: str) -> Path:
    """The file that `checkpoint` of `load` means.

    Raises:
        ConfigError: there is none.
    """
    store = folder.checkpoints
    if checkpoint == "best":
        best = store.best()
        if best is not None:
            return store.path(best.step)
    if checkpoint in ("best", "last"):
        newest = store.newest()
        if newest is None:
            raise ConfigError(f"run={folder.path}: no checkpoint in {store.folder}")
        return newest
    if not Path(checkpoint).is_file():
        raise ConfigError(f"checkpoint={checkpoint}: no such file; allowed: best, last or a file")
    return Path(checkpoint)


def _check_tokenizer(folder: RunFolder, task: Task) -> None:
    """A tokeniser that was made again from other text gives the ids another meaning."""
    recorded = folder.record()["data"].get("tokenizer", {}).get("sha256")
    found = task.facts().get("tokenizer", {}).get("sha256")
    if recorded != found:
        raise ConfigError(
            f"run={folder.path}: the data at hand gives another tokeniser than the run's; "
            f"expected sha256 {recorded}, found {found}"
        )
