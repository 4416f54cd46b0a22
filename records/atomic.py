"""Writing a file so that a reader, or the next run, sees all of it or none of it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX = ".partial"  # of the file that is being written; left behind only by a kill


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends, and never when it raises.

    It is written beside `path`, forced to the disk and renamed, so that `path` is the old file or
    the new one at every moment, whatever happens to the process or the machine.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; floats read back as the same floats."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove_partial(folder: Path) -> None:
    """Delete what killed writers left in `folder`; nobody else may be writing there."""
    for leftover in folder.glob(f".*{SUFFIX}"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can open a folder to do so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
