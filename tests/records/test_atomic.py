"""A file is replaced as a whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from records.atomic import atomic_file, remove_partial, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]

WRITE_FOR_EVER = """
import sys
from pathlib import Path
from records.atomic import write_text
n = 0
while True:
    write_text(Path(sys.argv[1]), f"{n}\\n" * 20_000)
    n = (n + 1) % 10
"""


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the new o")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_floats_read_back_as_the_same_floats(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, float("inf")]
    write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_text()) == values


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for attempt in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.05 + 0.013 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        lines = path.read_text().splitlines()
        assert len(lines) == 20_000
        assert len(set(lines)) == 1
    remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
