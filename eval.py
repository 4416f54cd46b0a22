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
    precision = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    if cfg.lm_eval.tasks:
        with precision:
            return _run_harness(cfg, folder, trained, console)
    task: Task = instantiate(cfg.task) if cfg.get("task") else trained.task
    with precision:
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


def _run_harness(cfg: DictConfig, folder: Any, trained: Any, console: Any) -> dict[str, Any]:
    """The tasks of lm-evaluation-harness, written to eval/lm_eval.json."""
    from hydra.utils import instantiate

    from evaluation.harness import print_harness, run_harness
    from schema.errors import ConfigError
    from tasks.text.task import LanguageModelling

    if not isinstance(trained.task, LanguageModelling):
        raise ConfigError(
            f"lm_eval.tasks: the run was trained on {trained.task.name}, "
            "which has no tokeniser to read a text with"
        )
    settings = instantiate(cfg.lm_eval, _convert_="all")
    result = run_harness(trained.model, trained.task.store.tokenizer, settings)
    result = {"checkpoint": trained.checkpoint.name, "note": trained.task.note, **result}
    path = folder.write_evaluation("lm_eval", result)
    console.print(f"{folder.path}, {trained.checkpoint.name}")
    print_harness(result, console)
    console.print(f"written to {path}")
    return result


def main(cfg: DictConfig) -> None:
    """The command."""
    evaluate_run(cfg)


if __name__ == "__main__":
    command(main, "eval")()
