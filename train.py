"""Train a model: `python train.py [group=choice] [key=value] ...`; --help lists what there is."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from schema.entry import command
from training.errors import TrainingError
from training.sweep import run_point


def train(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Train the model that `cfg` describes and score it on the test split.

    With cfg.resume, go on with that run; `overrides`, key=value each, may change a few of its keys.

    Returns:
        The scores of the test split, see training.scores.

    Raises:
        ConfigError: something cannot be as asked for; nothing was written.
        TrainingError: the run cannot go on.
        SystemExit: a signal stopped the run.
    """
    # Torch and lightning take seconds to import, which a mistake on the command line need not wait.
    from hydra.utils import instantiate
    from rich.console import Console

    from evaluation import Settings, evaluate, print_table
    from records.process import is_first_process
    from tasks.base import Task
    from training.budget import fitted_to_config
    from training.callbacks.signals import StopSignals
    from training.data import loader_of
    from training.fit import fit
    from training.module import build_module
    from training.origins import start_from
    from training.resume import open_run
    from training.run import describe, model_facts, open_folder, recorded, rehearse
    from training.scores import CRITERIA, scores
    from training.sequence import check_sequence
    from training.trainer import set_up_process
    from training.transfer_objective import objective_scores

    console = Console(quiet=not is_first_process(), highlight=False, soft_wrap=True)
    resumed = open_run(cfg, overrides) if cfg.resume else None
    if resumed is not None:
        cfg = resumed.cfg
        if resumed.finished:
            console.print(f"{resumed.folder.path} is finished: {resumed.step} steps")
            return resumed.scores
    set_up_process(cfg)
    task: Task = instantiate(cfg.task)
    task.prepare()
    chosen = {} if resumed else fitted_to_config(cfg, task)
    module = build_module(cfg, task.vocab_size)
    origins = start_from(module, cfg, task, resumed)
    loader = loader_of(task, cfg, step=resumed.step if resumed else 0)
    test = Settings(prefix=cfg.objective.get("prefix_len"), samples=0, cost=False)
    validation = replace(test, protocol="windowed")
    facts = model_facts(module.model, length=rehearse(module, loader))
    check_sequence(cfg, module.model, facts["length"])
    folder = open_folder(cfg, resumed, task, facts, {**origins, **chosen})
    console.print(describe(module.model, facts))
    for name, entry in chosen.items():
        console.print(f"{name}: {', '.join(f'{key} {value}' for key, value in entry.items())}")

    def validate() -> dict[str, float]:
        result = evaluate(module.model, task, "validation", validation, console=Console(quiet=True))
        return scores(result) | objective_scores(module, task)

    with StopSignals() as signals, recorded(folder, resumed, console.print) as record:
        fitted = fit(
            module,
            loader,
            folder,
            cfg,
            checkpoint=resumed.checkpoint if resumed else None,
            validate=validate,
            validate_first=bool(origins),
            criterion=CRITERIA[task.kind],
            signals=signals,
            console=console,
        )
        record.update(fitted.facts)
        signals.raise_if_received()
        if not is_first_process():
            return {}
        with fitted.precision():
            result = evaluate(module.model, task, "test", test, console=console)
        checkpoint = folder.checkpoints.path(fitted.facts["steps"])
        folder.write_evaluation(task.name, {"checkpoint": checkpoint.name, **result})
        print_table(result, console)
        console.print(f"run folder: {folder.path}")
        return scores(result)


def main(cfg: DictConfig) -> None:
    """The command: a run that cannot go on is one line and exit code 1, in a sweep one point."""
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        run_point(cfg, hydra.overrides.task)
        return
    try:
        train(cfg, hydra.overrides.task)
    except TrainingError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command(main, "config")()
