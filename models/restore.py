"""The network of a run, with the weights of one of its checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from models.build import build_model
from models.interface import TokenModel
from records.checkpoints import DamagedCheckpoint, read_checkpoint
from records.folder import RunFolder
from schema.errors import ConfigError

PREFIX = "model."  # what the names of the network's tensors in a checkpoint start with


class Weights(NamedTuple):
    """The network's tensors by name, and the checkpoint they are from."""

    tensors: dict[str, Tensor]
    path: Path


def restore(
    folder: RunFolder,
    checkpoint: str,
    cfg: DictConfig,
    vocab_size: int,
    data: Mapping[str, Any],
) -> tuple[TokenModel, Path]:
    """The model of a run, and the checkpoint its weights are from.

    Args:
        checkpoint: as of `find_checkpoint`.
        cfg: of the run.
        vocab_size: of the data.
        data: a task's facts, whose tokeniser must be the run's.

    Raises:
        ConfigError: no such checkpoint, a damaged one, or one of another network or tokeniser.
    """
    weights = read_weights(folder, checkpoint, data)
    try:
        model = build_model(cfg, vocab_size)
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"run={folder.path} was made by another version: {said}") from error
    put_weights(model, weights, data)
    return model, weights.path


def read_weights(folder: RunFolder, checkpoint: str, data: Mapping[str, Any]) -> Weights:
    """The weights in one of a run's checkpoints.

    Raises:
        ConfigError: no such checkpoint, a damaged one, or a run on another tokeniser than `data`'s.
    """
    path = find_checkpoint(folder, checkpoint)
    try:
        saved = read_checkpoint(path)["state_dict"]
    except DamagedCheckpoint as error:
        raise ConfigError(f"checkpoint={checkpoint}: {error}") from error
    _check_tokenizer(folder, data)
    own = {name.removeprefix(PREFIX): w for name, w in saved.items() if name.startswith(PREFIX)}
    return Weights(own, path)


def put_weights(model: TokenModel, weights: Weights, data: Mapping[str, Any]) -> None:
    """Replace all parameters and buffers of `model`.

    Raises:
        ConfigError: they are of another vocabulary or network.
    """
    name = next(n for n, p in model.named_parameters() if p is model.embedding.weight)
    found, expected = len(weights.tensors.get(name, ())), len(model.embedding.weight)
    if found != expected:
        raise ConfigError(
            f"checkpoint={weights.path} has a vocabulary of {found} ids; "
            f"the run's own, with task={data['name']}, has {expected}"
        )
    try:
        model.load_state_dict(weights.tensors)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"checkpoint={weights.path} is of another network: {said}") from None


def find_checkpoint(folder: RunFolder, checkpoint: str) -> Path:
    """The file that `checkpoint` means: "best" (by validation; the last where nothing was
    validated), "last", or the path of a file.

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
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise ConfigError(f"checkpoint={checkpoint}: no such file; allowed: best, last or a file")
    return path


def _check_tokenizer(folder: RunFolder, data: Mapping[str, Any]) -> None:
    """A tokeniser that was made again from other text gives the ids another meaning."""
    recorded = folder.record()["data"].get("tokenizer", {}).get("sha256")
    found = data.get("tokenizer", {}).get("sha256")
    if recorded != found:
        raise ConfigError(
            f"run={folder.path}: the data at hand gives another tokeniser than the run's; "
            f"expected sha256 {recorded}, found {found}"
        )
