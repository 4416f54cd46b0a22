"""A trained model from the folder of its run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from models.interface import TokenModel
from models.restore import find_checkpoint, restore
from records.folder import RunFolder
from tasks.base import Task


@dataclass(frozen=True)
class Trained:
    """A model, the prepared task it was trained on, and the checkpoint its weights are from."""

    model: TokenModel
    task: Task
    checkpoint: Path


def load(folder: RunFolder, checkpoint: str, cfg: DictConfig, device: torch.device) -> Trained:
    """The model of a run with the weights of one of its checkpoints, on `device`.

    Args:
        checkpoint: as of models.restore.find_checkpoint.
        cfg: of the run. Its task is read again, for the tokeniser.

    Raises:
        ConfigError: no such checkpoint, a damaged one, or one of another network or tokeniser.
    """
    find_checkpoint(folder, checkpoint)  # before the data, which may take long
    task: Task = instantiate(cfg.task)
    task.check()
    task.prepare()
    model, path = restore(folder, checkpoint, cfg, task.vocab_size, task.facts())
    return Trained(model.to(device), task, path)


def point_to_data(own: DictConfig, cfg: DictConfig) -> None:
    """Where data is looked for: where `cfg` says, else where the run's configuration does."""
    for key, node in (("root", own.task.get("corpus")), ("cache", own.task)):
        if cfg.data[key] is None:
            cfg.data[key] = own.data[key]
        elif node is not None and key in node:
            node[key] = cfg.data[key]


def choose_device(accelerator: str) -> torch.device:
    """The device of an accelerator option: "auto" takes a GPU where there is one."""
    gpu = None if accelerator == "cpu" else torch.accelerator.current_accelerator()
    return gpu or torch.device("cpu")
