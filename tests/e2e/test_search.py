"""Searches on real processes: trials as points, stopped, failed, pruned and gone on with."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from records.folder import RunFolder
from records.points import points
from schema.errors import ConfigError
from tests.e2e.runs import ROOT, TINY
from training.search import Plan

SHORT = (*TINY, "trainer.max_steps=20", "trainer.validate_every=10")
RATES = "space={optimizer.lr: {low: 1e-4, high: 1e-2, log: true}}"
LONG_AND_WIDE = "space={model.d_model: [8, 16], trainer.max_steps: [300]}"


def search(folder: Path, *told: str, overrides: tuple[str, ...] = SHORT) -> subprocess.Popen:
    """search.py as a command."""
    listed = "overrides=[" + ",".join(repr(each) for each in overrides) + "]"
    return subprocess.Popen(
        [sys.executable, "search.py", listed, f"out={folder}", *told],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (["space={optimizer.lr: [fast]}"], "optimizer.lr='fast' (str): expected float"),
        ([RATES, "trials=0"], "trials=0 (int): expected int of at least 1"),
        ([], "space: missing"),
    ],
)
def test_bad_input_is_one_line(tmp_path, told, line):
    code, output = finish(search(tmp_path / "s", *told))
    assert code == 2, output
    assert line in output
    assert output.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space={}: expected a key and what it may be"),
        ({"optimizer.lr": 1}, "space.optimizer.lr=1: expected a list of choices, or"),
        ({"optimizer.lr": []}, "expected a list of choices, or"),
        ({"optimizer.lr": {"low": 2, "high": 1}}, "expected low < high"),
        ({"optimizer.lr": {"low": 0, "high": 1, "log": True}}, "above 0 with log"),
        ({"optimizer.lr": {"low": 1e-4, "high": 1e-2, "steps": 3}}, "expected a list of choices"),
        ({"optimiser.lr": [1.0]}, "unknown key"),
    ],
)
def test_a_space_that_is_none(tmp_path, space, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Plan(SHORT, space, trials=1, jobs=1, seed=0, pruner="none", startup=1, out=str(tmp_path))


@pytest.mark.slow
def test_a_search_ends_where_asked_and_goes_on_from_there(tmp_path):
    code, output = finish(search(tmp_path, RATES, "trials=1"))
    assert code == 0, output
    (first,) = trials(tmp_path)
    code, output = finish(search(tmp_path, RATES, "trials=2"))
    assert code == 0, output
    assert "1 of 2 trials done before" in output
    made = trials(tmp_path)
    assert made[0] == first
    assert [each["status"] for each in made] == ["complete", "complete"]
    assert made[0]["optimizer.lr"] != made[1]["optimizer.lr"]
    assert len(points(tmp_path)) == 2
    # The score on record is the best of the run's own validation.
    for folder in points(tmp_path):
        run = RunFolder.open(folder)
        scores = [row["validation/accuracy"] for row in run.metrics() if len(row) > 6]
        lr = run.config()["optimizer"]["lr"]
        (row,) = [each for each in made if float(each["optimizer.lr"]) == lr]
        assert float(row["validation/accuracy"]) == pytest.approx(max(scores), rel=1e-5)


@pytest.mark.slow
def test_a_trial_that_fails_is_told_and_not_tried_again(tmp_path):
    told = ("space={optimizer.lr: [1e30]}", "trials=1")
    code, output = finish(search(tmp_path, *told))
    assert code == 0, output
    (failed,) = trials(tmp_path)
    assert failed["status"].startswith("failed: ")
    assert "not finite" in failed["status"]
    code, output = finish(search(tmp_path, *told))
    assert "1 of 1 trials done before" in output


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_was_under_way_goes_on(tmp_path, how):
    told = ("space={trainer.max_steps: [600]}", "trials=1")
    process = search(tmp_path, *told, overrides=(*TINY, "trainer.checkpoint_every=20"))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoints/step*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    finish(process)
    (folder,) = points(tmp_path)
    deadline = time.monotonic() + 60
    while RunFolder.open(folder).record()["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)  # it stops with a checkpoint when its parent is gone
    code, output = finish(search(tmp_path, *told, overrides=(*TINY, "trainer.checkpoint_every=20")))
    assert code == 0, output
    assert [each["status"] for each in trials(tmp_path)] == ["fail", "complete"]
    steps = [int(row["step"]) for row in RunFolder.open(folder).metrics()]
    assert steps == list(range(1, 601)), "every step once"


@pytest.mark.slow
def test_a_hopeless_trial_is_pruned(tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("\n".join(f"{n} times {n} is {n * n}" for n in range(2000)))
    overrides = (
        "task=text", f"files=[{text}]", "task.tokenizer=bytes", "model=tiny",
        "model.d_model=32", "model.num_layers=1", "pattern=conv", "trainer.max_steps=400",
        "trainer.validate_every=20", "scheduler.warmup_steps=0",
    )  # fmt: skip
    told = ("space={optimizer.lr: [1e-7, 3e-3]}", "startup=1", "trials=4", "seed=1")
    code, output = finish(search(tmp_path / "s", *told, overrides=overrides))
    assert code == 0, output
    pruned = [each for each in trials(tmp_path / "s") if each["status"] == "pruned"]
    assert pruned, output
    assert {each["optimizer.lr"] for each in pruned} == {"1e-07"}
    assert all(int(each["step"]) < 400 for each in pruned)
