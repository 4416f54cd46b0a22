"""Sweeps on real processes: a folder of points, each done once, whatever becomes of the others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from records.folder import RunFolder
from records.points import Point, point_name, points, read_point
from tests.e2e.runs import ROOT, TINY

# A point costs some seconds of imports: few of them, and few steps.
SHORT = (*TINY, "trainer.max_steps=20", "trainer.validate_every=10")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process signals of Linux")


def sweep(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """train.py -m in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "train.py", "-m", *SHORT, f"hydra.sweep.dir={folder}", *overrides],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def by_status(folder: Path) -> dict[str, list[Point]]:
    """The points of a sweep, by what became of them."""
    found: dict[str, list[Point]] = {}
    for point in points(folder).values():
        found.setdefault(point.status, []).append(point)
    return found


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in RunFolder.open(folder).metrics()]


def test_a_point_that_fails_is_told_and_the_rest_runs(tmp_path):
    code, output = finish(sweep(tmp_path, "optimizer.lr=1e30,1e-3"))
    assert code == 1, output
    found = by_status(tmp_path)
    assert len(found["finished"]) == 1
    (failed,) = found["failed"]
    assert "not finite" in str(failed.error)
    assert "1 of 2 points finished" in output
    assert f"{failed.error}\n" in output.split("points finished")[1]

    code, output = finish(sweep(tmp_path, "optimizer.lr=1e-3"))
    assert code == 1, "the failed point is in the folder still"
    assert "finished before" in output
    assert failed.command.startswith("python train.py ")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "two_processes", "local_jobs"])
def test_launchers(tmp_path, launcher):
    code, output = finish(sweep(tmp_path, "seed=0,1", f"hydra/launcher={launcher}"))
    assert code == 0, output
    assert len(by_status(tmp_path)["finished"]) == 2
    for folder in points(tmp_path):
        assert steps(folder) == list(range(1, 21))


def test_the_script_for_slurm(tmp_path):
    """What sbatch is handed, which here keeps it and refuses."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "$last" {tmp_path}/script\nexit 1\n')
    sbatch.chmod(0o755)
    (tmp_path / "srun").symlink_to(sbatch)
    process = sweep(
        tmp_path / "sweep", "seed=0,1", "hydra/launcher=slurm", "hydra.launcher.partition=long",
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    code, output = finish(process)
    assert code != 0, output
    script = (tmp_path / "script").read_text()
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in script.splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    wanted = {
        "partition": "long", "time": "1440", "cpus-per-task": "8", "gpus-per-node": "1",
        "mem": "64GB", "signal": "USR2@120", "array": "0-1%2",
    }  # fmt: skip
    assert asked.items() >= wanted.items(), script
    assert f"{sys.executable} -u -m submitit.core._submit" in script


def test_without_slurm_it_is_one_line(tmp_path):
    told = ("seed=0,1", "hydra/launcher=slurm")
    code, output = finish(sweep(tmp_path, *told, env={"PATH": str(tmp_path)}))
    assert (code, output) == (
        2, "error: hydra/launcher=slurm: there is no srun here, this is no Slurm cluster\n"
    )  # fmt: skip


@pytest.mark.slow
def test_what_is_killed_goes_on(tmp_path):
    """kill -9 of a point's process, then of the sweep; started again, it does what is left."""
    long = ("trainer.max_steps=400", "trainer.checkpoint_every=5", "seed=0,1")
    process = sweep(tmp_path, *long)
    first = _process_of(tmp_path, process, 1)
    os.kill(first, signal.SIGKILL)
    second = _process_of(tmp_path, process, 2)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{second}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # it stops with a checkpoint when its parent is gone
    found = by_status(tmp_path)
    assert [point.error for point in found["failed"]] == ["killed by SIGKILL"]

    code, output = finish(sweep(tmp_path, *long))
    assert code == 0, output
    assert len(by_status(tmp_path)["finished"]) == 2
    for folder in points(tmp_path):
        assert steps(folder) == list(range(1, 401)), "every step once"
        assert "going on with" in Path(f"{folder}.log").read_text()


def _process_of(folder: Path, sweep: subprocess.Popen, number: int) -> int:
    """The process that trains the sweep's point `number`, when it has made a checkpoint."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and sweep.poll() is None:
        running = [path for path, point in points(folder).items() if point.status == "running"]
        if len(points(folder)) == number and running and any(running[0].glob("checkpoints/step*")):
            found = subprocess.run(
                ["pgrep", "-f", f"run_dir={running[0]}"], capture_output=True, text=True
            )
            return int(found.stdout.split()[0])
        time.sleep(0.05)
    raise AssertionError("the point did not come so far")


@pytest.mark.slow
def test_two_sweeps_in_one_folder(tmp_path):
    first = sweep(tmp_path, "seed=0,1", "trainer.max_steps=100000")
    deadline = time.monotonic() + 60
    while not points(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    code, output = finish(sweep(tmp_path, "seed=2"))
    assert code == 2
    assert output.strip().endswith("another sweep runs in this folder")
    os.killpg(first.pid, signal.SIGINT)
    finish(first)
    assert read_point(next(iter(points(tmp_path)))).status == "interrupted"  # type: ignore[union-attr]


def test_names_of_points():
    overrides = ["model.d_model=64", "pattern=[conv,attention]", "seed=1", "optimizer.lr=0.1"]
    name = point_name(overrides)
    assert name.startswith("pattern-conv-attention_seed-1_lr-0.1_d_model-64-")
    assert name == point_name(overrides[::-1])
    elsewhere = ["run_dir=x", "data.root=y", "logger=wandb", "hydra.sweep.dir=z", "sweep=seeds"]
    assert point_name(["seed=1", *elsewhere]) == point_name(["seed=1"])
    assert point_name(["seed=1"]) != point_name(["seed=2"])
    assert point_name(["optimizer.lr=1e+38"]).startswith("lr-1e38-")
    assert len(point_name([f"a{i}={i}" for i in range(99)])) < 100


def test_a_half_written_point_is_none(tmp_path):
    (tmp_path / "point.json").write_text('{"status": "fin')
    assert read_point(tmp_path) is None
