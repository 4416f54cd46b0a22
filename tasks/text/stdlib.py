"""The running Python's standard library as a corpus: real text that is on every machine."""

import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from schema.errors import ConfigError
from tasks.base import Split
from tasks.text.corpus import Chunk, Corpus

# Tests and bundled or installed packages are not the library; the codecs are hundreds of tables
# that hardly differ, so that one in the training split would give away the others.
_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "encodings"}
)
_HELP = "pydoc_data/topics.py"  # holds the help texts, which are read as texts instead


class _Source(NamedTuple):
    name: str
    size: int  # bytes
    text: Callable[[], str]


class Stdlib(Corpus):
    """Sources of the standard library's modules and the texts of Python's help().

    A document is a module or a help topic. Its name decides its split, 18 in 20 to train and one
    each to validate and test on, so that the splits stay as they are when the cap changes. The
    text differs between versions of Python; its hash is in the record.

    Args:
        max_mb: at most so many million bytes, chosen by a hash of the names.

    Raises:
        ConfigError: max_mb is not positive.
    """

    def __init__(self, max_mb: float = 8.0) -> None:
        if not max_mb > 0:
            raise ConfigError(f"task.corpus.max_mb={max_mb}: expected more than 0")
        self.name = f"stdlib-{platform.python_version()}"
        self.max_mb = max_mb

    def check(self) -> None:
        """See Corpus."""
        if not (_folder() / "os.py").is_file():
            raise ConfigError(
                f"task=stdlib: this Python has no sources of its standard library in {_folder()}"
            )

    def read(self, split: Split) -> Iterator[Chunk]:
        """See Corpus; by name, modules before help topics."""
        for source in self._chosen():
            if _split(source.name) == split:
                yield Chunk(source.text(), source.name)

    def _chosen(self) -> list[_Source]:
        everything = [*_modules(), *_topics()]
        room, names = self.max_mb * 1e6, set()
        for source in sorted(everything, key=lambda source: _digest(source.name)):
            room -= source.size
            if room < 0:
                break
            names.add(source.name)
        return [source for source in everything if source.name in names]


def _folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> Iterator[_Source]:
    folder = _folder()
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name, path in sorted(paths.items()):
        if name != _HELP and not _LEFT_OUT.intersection(name.split("/")):
            yield _Source(name, path.stat().st_size, partial(_text, path))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:  # no source of CPython's; a document without text is left out
        return ""


def _topics() -> Iterator[_Source]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package the help texts apart
        return
    for name, text in sorted(topics.items()):
        yield _Source(f"help/{name}", len(text.encode()), partial(str, text))


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _split(name: str) -> Split:
    bucket = int.from_bytes(_digest(name)[-8:], "big") % 20
    return "train" if bucket < 18 else "validation" if bucket == 18 else "test"
