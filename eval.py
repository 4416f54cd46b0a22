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
    if cfg.decode:
        with precision:
            return _time_decoding(cfg, own, folder, trained, console)
    if cfg.lm_eval.tasks or cfg.get("probe"):
        with precision:
            return _ask(cfg, folder, trained, settings, console)
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


def _time_decoding(
    cfg: DictConfig, own: DictConfig, folder: Any, trained: Any, console: Any
) -> dict[str, Any]:
    """Decode speed over context length, beside attention of the same size."""
    from evaluation.decode import decode_speeds, plot_speeds, print_speeds
    from models.build import build_model
    from schema.check import plain

    counterpart = build_model(
        {**plain(own), "pattern": "attention", "memory": None}, trained.model.vocab_size
    )
    subject = own.pattern if isinstance(own.pattern, str) else ", ".join(own.pattern)
    models = {subject: trained.model}
    models["attention"] = counterpart.to(trained.model.head_weight.device)
    result = decode_speeds(models, list(cfg.decode))
    path = folder.write_evaluation("decode", result)
    console.print(print_speeds(result))
    plot_speeds(result, path.with_suffix(".png"))
    console.print(f"written to {path} and {path.with_suffix('.png').name}")
    return result


def _ask(cfg: DictConfig, folder: Any, trained: Any, settings: Any, console: Any) -> dict[str, Any]:
    """What reads texts beside the run's own: tasks of lm-evaluation-harness, or a probe."""
    from hydra.utils import instantiate

    from evaluation.evaluate import probe
    from evaluation.harness import print_harness, run_harness
    from evaluation.table import print_table
    from schema.errors import ConfigError
    from tasks.text.task import LanguageModelling

    key = "lm_eval.tasks" if cfg.lm_eval.tasks else f"probe={cfg.probe._target_.split('.')[-1]}"
    if not isinstance(trained.task, LanguageModelling):
        raise ConfigError(
            f"{key}: the run was trained on {trained.task.name}, "
            "which has no tokeniser to read a text with"
        )
    if cfg.lm_eval.tasks:
        harness = instantiate(cfg.lm_eval, _convert_="all")
        result = run_harness(trained.model, trained.task.store.tokenizer, harness)
        name, show = "lm_eval", print_harness
        result = {"note": trained.task.note, **result}
    else:
        asked = instantiate(cfg.probe, _convert_="all")
        result = probe(trained.model, asked, settings, trained.task, console=console)
        name, show = asked.name, print_table
    result = {"checkpoint": trained.checkpoint.name, **result}
    path = folder.write_evaluation(name, result)
    console.print(f"{folder.path}, {trained.checkpoint.name}")
    show(result, console)
    console.print(f"written to {path}")
    return result


def main(cfg: DictConfig) -> None:
    """The command."""
    evaluate_run(cfg)


if __name__ == "__main__":
    command(main, "eval")()
