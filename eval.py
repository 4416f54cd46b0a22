"""Evaluate a run: `python eval.py run=<folder> [task=...] [eval.protocol=...]`; see --help."""

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from schema.entry import command


def evaluate_run(cfg: DictConfig) -> dict[str, Any]:
    """Score the run `cfg.run` and write what was measured to its eval/<task>.json.

    Raises:
        ConfigError: something is missing or does not fit; nothing was written.
    """
    # Torch takes seconds to import, which a mistake on the command line need not wait for.
    import torch
    from hydra.utils import instantiate
    from rich.console import Console

    from evaluation import Settings, evaluate, print_table
    from evaluation.load import choose_device, load, point_to_data
    from records.folder import RunFolder
    from tasks.base import Task
    from training.pages import keep_freed_pages

    keep_freed_pages()
    console = Console(highlight=False, soft_wrap=True)
    settings: Settings = instantiate(cfg.eval)
    folder = RunFolder.open(cfg.run)
    own = folder.config()
    if settings.prefix is None:
        settings = replace(settings, prefix=own.objective.get("prefix_len"))
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


def main(cfg: DictConfig) -> None:
    """The command."""
    evaluate_run(cfg)


if __name__ == "__main__":
    command(main, "eval")()
