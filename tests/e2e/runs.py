"""Runs small enough to be made, killed and repeated in seconds."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from records.checkpoints import read_checkpoint
from records.folder import RunFolder
from schema.compose import compose
from train import train

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60

# 60 examples in batches of 4 are 15 micro-batches an epoch, an odd number: with two of them to a
# step, every second epoch begins in the middle of one.
TINY = (
    "task.vocab_size=32",
    "task.train=[{seq_len: 16, num_kv_pairs: 2, num_examples: 60}]",
    "task.test=[{seq_len: 16, num_kv_pairs: 2, num_examples: 16}]",
    "task.order=shuffled",
    "task.recipe.batch_size=4",
    "model.d_model=16",
    "model.dropout=0.1",
    "trainer.accumulate=2",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every=1",
    "trainer.validate_every=20",
    "trainer.checkpoint_every=10",
    "scheduler.warmup_steps=5",
)


def train_here(*overrides: str) -> dict[str, float]:
    """train.py in this process."""
    return train(compose("config", overrides), overrides)


def start(*overrides: str) -> subprocess.Popen:
    """train.py as a command, with as many threads as this process has."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Return when `path` is there, which `process` is to make."""
    while not path.exists():
        if process.poll() is not None:
            raise AssertionError(f"ended without {path.name}: {process.communicate()[0]}")
        time.sleep(0.002)


def assert_equal_runs(run: RunFolder, other: RunFolder) -> None:
    """Every number of training, every tensor of the last checkpoint and every score, exactly."""
    rows, others = (without_timing(each) for each in (run, other))
    assert rows == others
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    ours, theirs = (read_checkpoint(each.checkpoints.path(STEPS)) for each in (run, other))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "generators"):
        assert_same(ours[key], theirs[key], key)
    assert run.checkpoints.best() == other.checkpoints.best()
    assert run.evaluation("mqar") == other.evaluation("mqar")


def without_timing(run: RunFolder) -> list[dict[str, float]]:
    """The rows of metrics.csv but for what no two runs have in common."""
    timing = "train/tokens_per_second"
    return [{name: x for name, x in row.items() if name != timing} for row in run.metrics()]


def assert_same(a: Any, b: Any, where: str) -> None:
    """Equal tensors and plain values, however nested."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where
