"""A run that was killed or stopped, and goes on, equals one that never was, bit for bit."""

import random
import signal
import time
from pathlib import Path

import pytest

from records.folder import RunFolder
from schema.errors import ConfigError
from tests.e2e.runs import STEPS, TINY, assert_equal_runs, start, train_here, wait_for

WORKERS = "trainer.num_workers=2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing happened to."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train_here(*TINY, WORKERS, f"run_dir={path}")
    return RunFolder.open(path)


def test_killed_and_resumed_equals_never_killed(whole: RunFolder, tmp_path: Path) -> None:
    """Dropout, two micro-batches a step, two workers, epochs that end inside a step."""
    path = tmp_path / "run"
    process = start(*TINY, WORKERS, f"run_dir={path}")
    run = RunFolder(path)
    wait_for(run.checkpoints.path(30), process)
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run.record()["status"] == "running"
    assert run.checkpoints.steps()[-1] < STEPS

    train_here(f"resume={path}")
    assert_equal_runs(run, whole)
    record = run.record()
    assert record["status"] == "finished"
    assert [each["step"] >= 30 for each in record["resumed_from"]] == [True]
    assert record["tokens"] == whole.record()["tokens"] == STEPS * 2 * 4 * 16


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(whole: RunFolder, tmp_path: Path) -> None:
    """Kills fall before the first checkpoint, between two, and while one is written."""
    path = tmp_path / "run"
    run = RunFolder(path)
    rng = random.Random(0)
    arguments = [*TINY, WORKERS, f"run_dir={path}"]
    for _ in range(6):
        process = start(*arguments)
        while not run.record_path.exists():
            time.sleep(0.005)
        arguments = [f"resume={path}"]
        before = run.metrics_path.stat().st_mtime if run.metrics_path.exists() else 0.0
        while process.poll() is None and (
            not run.metrics_path.exists() or run.metrics_path.stat().st_mtime == before
        ):
            time.sleep(0.002)  # until training has begun to write
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    train_here(f"resume={path}")
    assert_equal_runs(run, whole)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(whole: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = start(*TINY, WORKERS, f"run_dir={path}")
    run = RunFolder(path)
    wait_for(run.checkpoints.path(20), process)
    while not list(run.checkpoints.folder.glob(".*.partial")):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    train_here(f"resume={path}")
    assert_equal_runs(run, whole)
    assert not list(run.checkpoints.folder.glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_checkpoint(
    whole: RunFolder, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    path = tmp_path / "run"
    process = start(*TINY, WORKERS, f"run_dir={path}")
    run = RunFolder(path)
    wait_for(run.checkpoints.path(20), process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    record = run.record()
    assert record["status"] == "stopped"
    newest = run.checkpoints.steps()[-1]
    assert record["steps"] == newest
    assert run.metrics()[-1]["step"] == newest
    assert f"resume={path} goes on from step-{newest:08d}.ckpt" in output
    assert "Traceback" not in output

    train_here(f"resume={path}")
    assert_equal_runs(run, whole)


def test_a_damaged_newest_checkpoint_is_passed_over(
    whole: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run"
    train_here(*TINY, f"run_dir={path}")
    run = RunFolder.open(path)
    elsewhere = {**run.record()["machine"], "cpu": "Another One"}
    run.update_record(status="running", machine=elsewhere)  # as after a kill
    newest = run.checkpoints.path(STEPS)
    newest.write_bytes(newest.read_bytes()[:-1000])
    capsys.readouterr()
    train_here(f"resume={path}")
    said = capsys.readouterr().out
    assert said.count(f"{newest.name} is damaged") == 1
    assert f"going on with {path}: step {STEPS - 10}" in said
    assert said.count("was Another One when the run started: its numbers may differ") == 1
    assert "threads is" not in said
    assert_equal_runs(run, whole)  # whose workers change nothing either


def test_a_finished_run_is_left_alone(whole: RunFolder, capsys: pytest.CaptureFixture) -> None:
    whole.write_evaluation("another", {"kind": "text"})  # eval.py on another task
    before = {p: p.stat().st_mtime_ns for p in whole.path.rglob("*")}
    scores = train_here(f"resume={whole.path}")
    assert f"is finished: {STEPS} steps" in capsys.readouterr().out
    assert scores["accuracy"] == whole.evaluation("mqar")["all"]["sequence_accuracy"]
    assert {p: p.stat().st_mtime_ns for p in whole.path.rglob("*")} == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pattern=[attention]", r"pattern=\[attention\]: a resumed run keeps its configuration"),
        ("optimizer.lr=0.1", "optimizer.lr=0.1: a resumed run keeps"),
        ("task=stdlib", "task=stdlib: a resumed run keeps"),
        ("trainer.max_steps=10", "trainer.max_steps=10: the run has made 60 steps"),
    ],
)
def test_what_a_resumed_run_cannot_change(whole: RunFolder, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_here(f"resume={whole.path}", override)


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    path, straight = tmp_path / "run", tmp_path / "straight"
    length = "scheduler.total_steps=30"
    train_here(*TINY, f"run_dir={path}", length, "trainer.max_steps=20")
    train_here(f"resume={path}", "trainer.max_steps=30", "trainer.checkpoint_every=5")
    train_here(*TINY, f"run_dir={straight}", length, "trainer.max_steps=30")
    run = RunFolder.open(path)
    assert run.config().trainer.max_steps == 30
    ours, theirs = (RunFolder.open(each).metrics() for each in (path, straight))
    assert [row["train/loss"] for row in ours] == [row["train/loss"] for row in theirs]


def test_other_data_than_the_run_was_trained_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_here(*TINY, f"run_dir={path}", "trainer.max_steps=10")
    run = RunFolder.open(path)
    cfg = run.config()
    cfg.task.seed = 1  # stands for files that have changed
    run.write_config(cfg)
    with pytest.raises(ConfigError, match="the train data is not what the run was trained on"):
        train_here(f"resume={path}", "trainer.max_steps=20")
