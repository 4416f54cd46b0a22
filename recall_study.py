"""Train and compare the arms of a recall study: `python recall_study.py [study=...] [out=...]`."""

import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from schema.entry import command

if TYPE_CHECKING:
    from evaluation.study import Plan, Point, Row

WIDTH = 130  # columns that a row needs
# What a run must have in common with the one that is asked for, to stand for it.
SAME = ("task", "model", "pattern", "mixers", "optimizer", "scheduler", "seed")


def study(cfg: DictConfig) -> list["Row"]:
    """Train what is not finished yet; print a table and write it to <out>/<study>.json.

    Raises:
        ConfigError: an arm that cannot be, or a folder with runs of other arms; nothing was run.
    """
    # Torch takes seconds to import, which a mistake on the command line need not wait for.
    from omegaconf import OmegaConf
    from rich.console import Console

    from evaluation.study import Plan, as_json, outcome, print_rows
    from records.atomic import write_json

    plan = Plan(**OmegaConf.to_container(cfg.study, resolve=True))  # type: ignore[arg-type]
    points = plan.points(Path(cfg.out).expanduser())
    todo = [(point, told) for point in points if (told := _told(plan, point))]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(points)} runs, {len(points) - len(todo)} of them finished")
    _run(todo, cfg.jobs, console)
    rows = outcome(plan, points)
    console = Console(highlight=False, width=max(console.width, WIDTH))
    console.print(print_rows(rows, plan))
    path = Path(cfg.out).expanduser() / "study.json"
    write_json(path, as_json(rows))
    console.print(f"written to {path}", soft_wrap=True)
    return rows


def _told(plan: "Plan", point: "Point") -> list[str]:
    """What train.py is told to make a run, or to go on with it; nothing when it is finished.

    Raises:
        ConfigError: the arm cannot be, or another run is in its place.
    """
    from records.folder import RunFolder
    from schema.check import check, plain
    from schema.compose import compose
    from schema.errors import ConfigError

    overrides = plan.overrides(point)
    cfg = compose("config", overrides)
    try:
        check(cfg)
    except ConfigError as error:
        raise ConfigError(f"study.arms.{point.arm}: {error}") from None
    if not (point.path / "config.yaml").exists():
        return [*overrides, f"run_dir={point.path}"]
    folder = RunFolder.open(point.path)
    made, asked = plain(folder.config()), plain(cfg)
    for key in SAME:
        if made.get(key) != asked.get(key):
            raise ConfigError(f"out={point.path}: a run with another {key}; give another out=")
    if folder.record()["status"] == "finished":
        return []
    if folder.checkpoints.newest() is None:  # nothing there that a new start would not make
        shutil.rmtree(point.path)
        return [*overrides, f"run_dir={point.path}"]
    return [f"resume={point.path}"]


def _run(todo: list[tuple["Point", list[str]]], jobs: int, console: Any) -> None:
    """Train side by side; what a run prints goes to a file beside its folder."""
    if not todo:
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        made = {pool.submit(_train, told, str(point.path)): point for point, told in todo}
        for done, future in enumerate(as_completed(made), start=1):
            accuracy = future.result()
            console.print(f"{done}/{len(todo)} {made[future].path.name}: {accuracy:.3f}")


def _train(overrides: list[str], name: str) -> float:
    """One run, in a process of its own; its test accuracy."""
    import torch

    from schema.compose import compose
    from train import train

    torch.set_num_threads(1)
    log = Path(f"{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        return train(compose("config", overrides), overrides)["accuracy"]


def main(cfg: DictConfig) -> None:
    """The command."""
    study(cfg)


if __name__ == "__main__":
    command(main, "recall_study")()
