"""A run is a folder.

    <run>/config.yaml         the whole configuration, resolved
    <run>/run.json            the record: how the run was made, on what, and how it stands
    <run>/metrics.csv         one row per logged step
    <run>/checkpoints/        see records.checkpoints
    <run>/eval/<task>.json    what an evaluation measured

Every file is written atomically, and written and read here only.
"""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from records.atomic import write_json, write_text
from records.checkpoints import CheckpointStore
from records.metrics import MetricsFile, read_metrics
from records.process import is_first_process
from schema.errors import ConfigError

Status = Literal["running", "finished", "stopped", "failed"]


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The run at `path`.

        Raises:
            ConfigError: there is no run.
        """
        run = cls(Path(path).expanduser())
        if not run.path.is_dir():
            raise ConfigError(f"{path}: there is no such folder; expected the folder of a run")
        for file in (run.config_path, run.record_path):
            if not file.is_file():
                raise ConfigError(f"{path}: no run folder, it has no {file.name}")
        return run

    @classmethod
    def create(cls, path: Path, cfg: DictConfig, record: dict[str, Any]) -> "RunFolder":
        """Make the folder of a run that starts now, with its configuration and record.

        Raises:
            ConfigError: there is a run at `path` already.
        """
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run.write_config(cfg)
        write_json(run.record_path, {"status": "running", "started": now(), **record})
        return run

    @property
    def config_path(self) -> Path:
        """config.yaml"""
        return self.path / "config.yaml"

    @property
    def record_path(self) -> Path:
        """run.json"""
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        """metrics.csv"""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> CheckpointStore:
        """checkpoints/"""
        return CheckpointStore(self.path / "checkpoints")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from training this run meanwhile.

        The system lifts the lock when the process ends, however it ends. Data workers that
        outlive it by a moment do not hold it.

        Raises:
            ConfigError: another process holds it.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # which of them depends on the system
                raise ConfigError(f"{self.path}: another process is training this run") from None
            yield

    def config(self) -> DictConfig:
        """The configuration the run was made with."""
        cfg = OmegaConf.load(self.config_path)
        if not isinstance(cfg, DictConfig):
            raise ConfigError(f"{self.config_path}: expected a mapping")
        return cfg

    def write_config(self, cfg: DictConfig) -> None:
        """Save the configuration, resolved."""
        write_text(self.config_path, OmegaConf.to_yaml(cfg, resolve=True))

    def record(self) -> dict[str, Any]:
        """What run.json says."""
        return json.loads(self.record_path.read_text(encoding="utf-8"))

    def update_record(self, **changes: Any) -> None:
        """Replace or add entries of run.json."""
        write_json(self.record_path, self.record() | changes)

    def close(self, status: Status, **changes: Any) -> None:
        """Record how the run ended, with further changes."""
        self.update_record(status=status, finished=now(), **changes)

    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv."""
        return read_metrics(self.metrics_path)

    def open_metrics(self, after_step: int | None = None) -> MetricsFile:
        """metrics.csv for writing; a resumed run drops the rows of steps beyond `after_step`."""
        return MetricsFile(self.metrics_path, after_step)

    def write_evaluation(self, task: str, result: dict[str, Any]) -> Path:
        """Save what an evaluation on `task` measured, replacing an earlier one."""
        path = self._evaluation_path(task)
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
        return path

    def evaluation(self, task: str) -> dict[str, Any]:
        """What was measured on `task`.

        Raises:
            ConfigError: nothing was.
        """
        path = self._evaluation_path(task)
        if not path.is_file():
            done = ", ".join(self.evaluations()) or "nothing"
            raise ConfigError(f"{self.path}: no evaluation of {task!r}; evaluated: {done}")
        return json.loads(path.read_text(encoding="utf-8"))

    def evaluations(self) -> list[str]:
        """Tasks that there is an evaluation of."""
        return sorted(path.stem for path in self.path.glob("eval/*.json"))

    def _evaluation_path(self, task: str) -> Path:
        return self.path / "eval" / f"{_plain(task)}.json"


def check_free(path: str | Path) -> None:
    """Return when a new run may be put at `path`, by the first of its processes.

    Raises:
        ConfigError: there is a run already, or a file.
    """
    if not is_first_process():  # the first may have made it by now
        return
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir={path} is a file; expected a folder that can be made")
    if (path / "config.yaml").exists() or (path / "run.json").exists():
        raise ConfigError(
            f"run_dir={path} holds a run already; resume={path} goes on with it, "
            "another run_dir starts anew"
        )


def new_path(task: str, pattern: str, root: Path = Path("outputs")) -> Path:
    """Make and return the folder <root>/<date>_<time>_<task>_<pattern>.

    The folder is claimed by making it, so that of two runs that start in the same second the
    later one gets a number at the end of its name.
    """
    root.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{_plain(task)}_{_plain(pattern)}"
    number = 1
    while True:
        path = root / (stem if number == 1 else f"{stem}_{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def now() -> str:
    """Local time with its offset, to the second."""
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def _plain(name: str) -> str:
    """`name` as part of a file name on any system."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"
