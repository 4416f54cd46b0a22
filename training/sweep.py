"""Sweeps: every point a process of its own, what became of it on record, done once.

Whatever launcher Hydra takes, a point's process may crash, be killed or run out of memory, and the
others run on. A sweep that is started again in the same folder does what is missing or failed.
"""

import contextlib
import ctypes
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from records.folder import RunFolder
from records.points import SWEEP, Point, points, read_point
from schema.errors import ConfigError

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
SINGLE = "hydra.mode=RUN"  # whatever mode an experiment asks for
WATCH = 0.5  # seconds
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_held: list[TextIO] = []  # the lock of the sweep that this process runs


def run_point(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Train one point of a sweep, unless that is done; never raises for what goes wrong in it.

    Args:
        cfg: of the point; its run_dir is the point's folder.
        overrides: of the point, as train.py takes them.

    Raises:
        KeyboardInterrupt, SystemExit: this process was told to stop; the point has been stopped,
            with a checkpoint.
    """
    folder, console = Path(cfg.run_dir), Console(highlight=False, soft_wrap=True)
    before = read_point(folder)
    if before is not None and before.status == "finished":
        console.print(f"{folder.name}: finished before")
        return
    console.print(f"{folder.name}: begins, see {log_of(folder)}")
    start = time.monotonic()
    point = train_point(folder, [each for each in overrides if not each.startswith("sweep=")])
    seconds = time.monotonic() - start
    what = point.status if point.error is None else f"{point.status}: {point.error}"
    console.print(f"{folder.name}: {what} ({seconds:.0f} s)", markup=False)


def train_point(
    folder: Path, overrides: Sequence[str], enough: Callable[[], bool] | None = None
) -> Point:
    """Make the run of a point, or go on with it, in a process of its own; what became of it.

    Args:
        enough: asked every WATCH seconds; True stops the run, with a checkpoint.

    Raises:
        KeyboardInterrupt, SystemExit: see run_point.
    """
    told, log = _told(folder, list(overrides)), log_of(folder)
    point = Point("running", list(overrides), shlex.join(["python", "train.py", *told]))
    point.write(folder)
    try:
        exit_code = _in_a_process(told, log, enough)
    except BaseException:
        point.status = "interrupted"
        point.write(folder)
        raise
    point.status, point.error = _outcome(folder, exit_code, log)
    point.write(folder)
    return point


def log_of(folder: Path) -> Path:
    """Where the process of a point prints to."""
    return folder.parent / f"{folder.name}.log"


class Sweep(Callback):
    """What happens before and after all points of a sweep, in the process that starts them."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Keep the folder for this sweep: two in one would train the same points."""
        if "Slurm" in config.hydra.launcher._target_ and shutil.which("srun") is None:
            _end("error: hydra/launcher=slurm: there is no srun here, this is no Slurm cluster", 2)
        folder = Path(config.hydra.sweep.dir)
        lock = held(folder)
        if lock is None:
            _end(f"error: hydra.sweep.dir={folder}: another sweep runs in this folder", 2)
        _held.append(lock)  # not on self, which a launcher sends to its processes

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Say what became of the points; exit code 1 if one of them has no result."""
        folder = Path(config.hydra.sweep.dir)
        found = points(folder)
        done = sum(point.status == "finished" for point in found.values())
        print(f"{done} of {len(found)} points finished in {folder}")
        lost = [f"{p.name}: {point.error}" for p, point in found.items() if point.error is not None]
        _held.pop().close()
        if lost:
            _end("\n".join([*lost, "the same command runs these again"]), 1)


def held(folder: Path) -> TextIO | None:
    """A lock on the folder, made where it is missing, until it is closed; None if it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        return None
    return lock


def _told(folder: Path, overrides: list[str]) -> list[str]:
    """What makes the point's run, or goes on with it."""
    try:
        if RunFolder.open(folder).checkpoints.newest() is not None:
            return [f"resume={folder}", SINGLE]
    except ConfigError:  # no run, or a half-written one
        pass
    shutil.rmtree(folder, ignore_errors=True)  # a new start makes all that is there
    return [*overrides, f"run_dir={folder}", SINGLE]


def _in_a_process(told: list[str], log: Path, enough: Callable[[], bool] | None) -> int:
    """train.py's exit code; a negative one is the signal that killed it."""
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *told],
            env={**os.environ, SWEEP: log.parent.name},
            stdout=file,
            stderr=file,
            preexec_fn=_end_with_parent,
        )
        with _signals_as_exits():
            try:
                return process.wait() if enough is None else _watched(process, enough)
            except BaseException:
                process.send_signal(signal.SIGTERM)  # stops with a checkpoint
                process.wait()
                raise


def _watched(process: subprocess.Popen, enough: Callable[[], bool]) -> int:
    while True:
        try:
            return process.wait(timeout=WATCH)
        except subprocess.TimeoutExpired:
            if enough():
                process.send_signal(signal.SIGTERM)
                return process.wait()


def _outcome(folder: Path, exit_code: int, log: Path) -> tuple[Any, str | None]:
    """Status and error of the point whose process has ended."""
    if exit_code < 0:
        return "failed", f"killed by {signal.Signals(-exit_code).name}"
    record: dict[str, Any] = {}
    with contextlib.suppress(ConfigError, ValueError):
        record = RunFolder.open(folder).record()
    if exit_code == 0 and record.get("status") == "finished":
        return "finished", None
    if record.get("status") == "stopped":
        return "interrupted", None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ") if lines else f"exit code {exit_code}"
    return "failed", record.get("error") or last


def _end_with_parent() -> None:
    """Stop, with a checkpoint, when the sweep is killed: nobody would wait for this process."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


@contextlib.contextmanager
def _signals_as_exits():
    """SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(message: str, exit_code: int) -> NoReturn:
    """Hydra turns what a callback raises into a warning, but for this."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(exit_code)
