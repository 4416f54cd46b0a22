"""Tasks of lm-evaluation-harness on a trained model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from models.interface import TokenModel
from schema.errors import ConfigError
from tasks.text.tokenizers import Tokenizer

OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"


@dataclass(frozen=True)
class HarnessSettings:
    """conf/eval.yaml has the same keys under `lm_eval`.

    Attributes:
        tasks: names of the harness's tasks, of those in evaluation/lm_eval_tasks or include_path.
        include_path: a folder with further task files.
        limit: documents of each task; None is all.
        num_fewshot: worked examples before each question; None is what the task says.
        batch_size: rows side by side.
        max_length: see SeqmixLM.

    Raises:
        ConfigError: a number out of its range.
    """

    tasks: Sequence[str] = ()
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"lm_eval.{name}={value}: expected at least {least}")


def run_harness(
    model: TokenModel, tokenizer: Tokenizer, settings: HarnessSettings
) -> dict[str, Any]:
    """The results of every task, as the harness gives them, in plain values.

    Raises:
        ConfigError: the harness is not installed, an unknown task, a folder that is not there, or
            data that cannot be had.
    """
    from evaluation.lm_eval_adapter import SeqmixLM

    lm = SeqmixLM(model, tokenizer, batch_size=settings.batch_size, max_length=settings.max_length)
    manager = _manager(settings)
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its signature
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant to be
    try:
        found = simple_evaluate(
            lm,
            tasks=list(settings.tasks),
            task_manager=manager,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"lm_eval.tasks: the data of a task cannot be had: {said}") from error
    return {
        "truncated_prompts": lm.truncated,
        "results": {
            name: {key: value for key, value in metrics.items() if _is_plain(value)}
            for name, metrics in found["results"].items()
        },
        "versions": found.get("versions", {}),
        "samples": found.get("n-samples", {}),
    }


def print_harness(result: dict[str, Any], console: Console) -> None:
    """Print what `run_harness` returned."""
    if result["note"]:
        console.print(result["note"], style="italic", markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "version", "metric", "value", "documents"):
        table.add_column(name, justify="right" if name in ("value", "documents") else "left")
    for task, metrics in result["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "stderr" not in metric:
                cells = task, result["versions"].get(task, ""), metric.removesuffix(",none")
                count = result["samples"].get(task, {}).get("effective", "")
                table.add_row(*map(str, cells), f"{value:.4f}", str(count))
    console.print(table)
    if result["truncated_prompts"]:
        console.print(f"{result['truncated_prompts']} prompts lost their beginning")


def _manager(settings: HarnessSettings) -> Any:
    """The index of tasks; the harness's own thousands are read only where they are asked for."""
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [OWN_TASKS]
    if settings.include_path is not None:
        path = Path(settings.include_path).expanduser()
        if not path.is_dir():
            raise ConfigError(f"lm_eval.include_path={path}: no such folder")
        folders.append(path)
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(settings.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them"
            raise ConfigError(f"lm_eval.tasks={name}: no such task; {hint}")
    return manager


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))
