"""Options looked for by optuna, on the validation split; every trial a point as of a sweep.

The study is a file in the folder, so that a search goes on where it was stopped, trials that were
under way from their last checkpoint.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from records.atomic import write_text
from records.folder import RunFolder
from records.points import point_name, read_point
from schema.check import check, check_here
from schema.compose import compose
from schema.errors import ConfigError
from training.callbacks.metrics import VALIDATION
from training.scores import CRITERIA, Criterion
from training.sweep import held, log_of, train_point

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError:
    raise ConfigError("optuna is not installed: pip install seqmix[sweep]") from None

STUDY = "study.journal"
TABLE = "trials.csv"
RANGE = {"low", "high", "log", "step"}
ERROR, AGAIN = "error", "started again"  # attributes of a trial that failed, and of the study


class TrialError(RuntimeError):
    """A trial's run ended without a score."""


@dataclass(frozen=True)
class Plan:
    """What is looked for; conf/search.yaml has the same keys.

    Raises:
        ConfigError: a range that is none, or options that a run cannot have.
    """

    overrides: Sequence[str]
    space: Mapping[str, Any]
    trials: int
    jobs: int
    seed: int
    pruner: str
    startup: int
    out: str

    def __post_init__(self) -> None:
        if not self.space:
            raise ConfigError("space={}: expected a key and what it may be")
        for key, values in self.space.items():
            _check_range(f"space.{key}", values)
            for value in _ends(values):
                cfg = compose("config", self.told({**self.first, key: value}))
                check(cfg)
                check_here(cfg)

    @property
    def first(self) -> dict[str, Any]:
        """The first end of everything."""
        return {key: _ends(values)[0] for key, values in self.space.items()}

    @property
    def folder(self) -> Path:
        """Of the search."""
        return Path(self.out).expanduser()

    def told(self, chosen: Mapping[str, Any]) -> list[str]:
        """What train.py is told."""
        return [*self.overrides, *(f"{key}={value}" for key, value in chosen.items())]

    def criterion(self) -> Criterion:
        """The validation score that a run of this task is chosen by."""
        return CRITERIA[instantiate(compose("config", self.told(self.first)).task).kind]


def search(plan: Plan) -> "optuna.Study":
    """Run the trials that are missing, print all of them, and write them to trials.csv.

    Raises:
        ConfigError: another search runs in the folder.
        KeyboardInterrupt, SystemExit: as told; what was under way goes on at the next start.
    """
    lock = held(plan.folder)
    if lock is None:
        raise ConfigError(f"out={plan.out}: another search runs in this folder")
    console = Console(highlight=False, soft_wrap=True)
    with lock:
        study = _study(plan)
        _enqueue_interrupted(study)
        missing = plan.trials - len(_done(study))
        console.print(f"{plan.folder}: {len(_done(study))} of {plan.trials} trials done before")
        try:
            if missing > 0:
                study.optimize(
                    _Objective(plan, console),
                    n_trials=missing,
                    n_jobs=plan.jobs,
                    catch=(TrialError,),
                )
        finally:
            _write(plan, study)
    console.print(_table(plan, study))
    best = [t for t in study.trials if t.state == TrialState.COMPLETE]
    if best:
        name = point_name(plan.told(study.best_params))
        console.print(f"best: {study.best_value:.6g}, {plan.folder / name}")
        console.print("python train.py " + " ".join(plan.told(study.best_params)), markup=False)
    return study


class _Objective:
    """From a trial to its score: the best that the validation split had in its run."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console = plan, console
        self.criterion = plan.criterion()

    def __call__(self, trial: "Trial") -> float:
        chosen = {key: _suggest(trial, key, each) for key, each in self.plan.space.items()}
        told = self.plan.told(chosen)
        folder = self.plan.folder / point_name(told)
        what = ", ".join(f"{key}={value}" for key, value in chosen.items())
        before = read_point(folder)
        if before is None or before.status != "finished":
            self.console.print(f"trial {trial.number}: {what}, see {log_of(folder)}")
            known: set[int] = set()

            def hopeless() -> bool:
                for step, score in self._scores(folder).items():
                    if step not in known:
                        trial.report(score, step)
                        known.add(step)
                return trial.should_prune()

            point = train_point(folder, told, hopeless)
            if point.status == "interrupted" and hopeless():
                self.console.print(f"trial {trial.number}: pruned")
                raise optuna.TrialPruned
            if point.status == "interrupted":
                raise KeyboardInterrupt  # its process was told to stop: so is the search
            if point.error is not None:
                self.console.print(f"trial {trial.number}: {point.error}", markup=False)
                trial.set_user_attr(ERROR, point.error)
                raise TrialError(point.error)
        scores = self._scores(folder).values()
        best = max(scores) if self.criterion.higher_is_better else min(scores)
        self.console.print(f"trial {trial.number}: {best:.6g}")
        return best

    def _scores(self, folder: Path) -> dict[int, float]:
        """What the run has scored on the validation split so far, by step."""
        column = VALIDATION + self.criterion.score
        try:
            rows = RunFolder.open(folder).metrics()
        except ConfigError:  # not begun
            return {}
        return {int(row["step"]): row[column] for row in rows if column in row}


def _study(plan: Plan) -> "optuna.Study":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(plan.folder / STUDY)))
    study = optuna.create_study(
        storage=storage,
        study_name="seqmix",
        load_if_exists=True,
        direction="maximize" if plan.criterion().higher_is_better else "minimize",
        pruner=optuna.pruners.NopPruner()
        if plan.pruner == "none"
        else optuna.pruners.MedianPruner(n_startup_trials=plan.startup),
    )
    # Other draws after a restart than before it.
    study.sampler = optuna.samplers.TPESampler(
        seed=plan.seed + len(study.trials), n_startup_trials=plan.startup
    )
    return study


def _done(study: "optuna.Study") -> list["FrozenTrial"]:
    """Trials with a score, pruned ones, and those whose run failed by itself."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return [t for t in study.trials if t.state in ended or ERROR in t.user_attrs]


def _enqueue_interrupted(study: "optuna.Study") -> None:
    """Have the trials that a stop or a kill ended tried again, each once."""
    again = set(study.user_attrs.get(AGAIN, []))
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state != TrialState.FAIL or ERROR in trial.user_attrs:
            continue
        if trial.number not in again and trial.params:
            study.enqueue_trial(trial.params)
            again.add(trial.number)
    study.set_user_attr(AGAIN, sorted(again))


def _suggest(trial: "Trial", key: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    options = {name: values[name] for name in ("log", "step") if name in values}
    whole = isinstance(values["low"], int) and isinstance(values["high"], int)
    suggest = trial.suggest_int if whole else trial.suggest_float
    return suggest(key, values["low"], values["high"], **options)


def _ends(values: Any) -> list[Any]:
    """All choices, or both ends of a range."""
    return values if isinstance(values, list) else [values["low"], values["high"]]


def _check_range(key: str, values: Any) -> None:
    """
    Raises:
        ConfigError: neither a list of choices nor a range.
    """
    if isinstance(values, list) and values:
        return
    numbers = (int, float)
    if (
        not isinstance(values, dict)
        or not {"low", "high"} <= set(values) <= RANGE
        or not all(isinstance(values[end], numbers) for end in ("low", "high"))
    ):
        raise ConfigError(
            f"{key}={values}: expected a list of choices, or {{low: number, high: number}} with "
            "log: true or step: number"
        )
    if values["low"] >= values["high"] or (values.get("log") and values["low"] <= 0):
        raise ConfigError(f"{key}={values}: expected low < high, and above 0 with log")


def _told_of(trial: "FrozenTrial") -> str:
    if ERROR in trial.user_attrs:
        return f"failed: {trial.user_attrs[ERROR]}"
    return trial.state.name.lower()


def _shown(plan: Plan, study: "optuna.Study") -> list[list[str]]:
    """A row for each trial: number, options, score, steps validated, what became of it."""
    rows = []
    for trial in study.trials:
        score = "" if trial.value is None else f"{trial.value:.6g}"
        options = [str(trial.params.get(key, "")) for key in plan.space]
        last = str(max(trial.intermediate_values, default=0))
        rows.append([str(trial.number), *options, score, last, _told_of(trial)])
    return rows


def _columns(plan: Plan) -> list[str]:
    return ["trial", *plan.space, VALIDATION + plan.criterion().score, "step", "status"]


def _write(plan: Plan, study: "optuna.Study") -> None:
    text = io.StringIO()
    csv.writer(text).writerows([_columns(plan), *_shown(plan, study)])
    write_text(plan.folder / TABLE, text.getvalue())


def _table(plan: Plan, study: "optuna.Study") -> Table:
    table = Table(*_columns(plan), box=None)
    for row in _shown(plan, study):
        table.add_row(*row)
    return table
