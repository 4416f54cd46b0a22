"""What machines do to runs: a full disk, too little memory, a killed data worker."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from records.folder import RunFolder
from tests.e2e.runs import ROOT, TINY, assert_equal_runs, start, train_here, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts of Linux"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing happened to."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train_here(*TINY, f"run_dir={path}")
    return RunFolder.open(path)


# In a mount namespace of its own: a run on a small disk, which grows before the run goes on.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$SIZE tmpfs "$DISK" || exit 77
"$PYTHON" train.py run_dir="$DISK/run" "$@" && echo "it fitted" && exit 1
cp -a "$DISK/run" "$KEPT/full"
mount -o remount,size=100m tmpfs "$DISK"
"$PYTHON" train.py resume="$DISK/run" || exit 1
cp -a "$DISK/run" "$KEPT/resumed"
"""


@pytest.mark.parametrize("checkpoints", [0.5, 1.5, 2.5])
def test_a_full_disk(whole: RunFolder, tmp_path: Path, checkpoints: float) -> None:
    """So many checkpoints fit. The run ends in one line, and goes on once there is room."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    one = whole.checkpoints.path(whole.checkpoints.steps()[-1]).stat().st_size
    environment = {
        **os.environ,
        "SIZE": f"{int((checkpoints * one + 20_000) // 1024)}k",
        "DISK": str(disk),
        "KEPT": str(kept),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", *TINY],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mounts of one's own here: {done.stderr.strip()}")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert f"error: {disk}/run: no space left on the disk; resume={disk}/run goes on" in output
    assert "Traceback" not in output
    full = RunFolder.open(kept / "full")
    assert not list(full.checkpoints.folder.glob(".*.partial"))
    newest = full.checkpoints.newest()
    assert (newest is not None) == (checkpoints >= 1)
    assert_equal_runs(RunFolder.open(kept / "resumed"), whole)


def test_too_little_memory_is_told_with_what_the_step_needs(tmp_path: Path) -> None:
    limited = 'ulimit -v $1; shift; exec "$@"'
    huge = ("task.recipe.batch_size=4096", "model.d_model=512", "task.vocab_size=512")
    task = "task.train=[{seq_len: 256, num_kv_pairs: 2, num_examples: 4096}]"
    command = [sys.executable, "train.py", *TINY, *huge, task, f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        ["sh", "-c", limited, "sh", str(12 << 20), *command],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("error: ")]
    assert "Traceback" not in done.stderr
    told = re.search(
        r"out of memory: .* ([\d.]+) GiB, and task.recipe.batch_size=4096 x 256 tokens keep "
        r"([\d.]+) GiB for the backward pass",
        line,
    )
    assert told is not None, line
    assert float(told[2]) > 12, "what did not fit is more than there was"
    assert RunFolder.open(tmp_path / "run").record()["status"] == "failed"


def test_a_data_worker_that_is_killed(whole: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = start(*TINY, "trainer.num_workers=1", f"run_dir={path}")
    wait_for(RunFolder(path).checkpoints.path(20), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (worker,) = [
        pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(int(worker), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert f"error: {path}: a data worker was killed; resume={path} goes on" in output
    assert "Traceback" not in output
    time.sleep(0.1)
    train_here(f"resume={path}", "trainer.num_workers=0")
    assert_equal_runs(RunFolder.open(path), whole)
