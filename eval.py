"""Evaluate a run: `python eval.py run=<folder> [task=...] [eval.protocol=...]`; see --help."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from evaluation import Settings, evaluate, print_table
from evaluation.load import load
from records.folder import RunFolder
from schema.entry import command
from tasks.base import Task
from training.pages import keep_freed_pages


def evaluate_run(cfg: DictConfig) -> dict[str, Any]:
    """Score the run `cfg.run` and write what was measured to its eval/<task>.json.

    Raises:
        ConfigError: something is missing or does not fit; nothing was written.
    """
    keep_freed_pages()
    console = Console(highlight=False, soft_wrap=True)
    settings: Settings = instantiate(cfg.eval)
    folder = RunFolder.open(cfg.run)
    own = folder.config()
    point_to_data(own, cfg)
    device = choose_device(cfg.accelerator)
    trained = load(folder, cfg.checkpoint, own, device)
    task: Task = instantiate(cfg.task) if cfg.get("task") else trained.task
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        result = evaluate(
            trained.model, task, cfg.split, settings, trained_on=trained.task, console=console
        )
    result = {"checkpoint": trained.checkpoint.name, **result}
    name = task.name if cfg.split == "test" else f"{task.name}_{cfg.split}"
    path = folder.write_evaluation(name, result)
    console.print(f"{folder.path}, {trained.checkpoint.name}")
    print_table(result, console)
    console.print(f"written to {path}")
    return result


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


def main(cfg: DictConfig) -> None:
    """The command."""
    evaluate_run(cfg)


if __name__ == "__main__":
    command(main, "eval")()
