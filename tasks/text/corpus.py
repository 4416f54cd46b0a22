"""What a corpus is: documents in three splits, streamed without losing a byte."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from schema.errors import ConfigError
from tasks.base import Split

PIECE = 1 << 20  # characters of text in memory at once; most documents are shorter


class Chunk(NamedTuple):
    """The next part of a text. `title` starts a document, None goes on with the last one."""

    text: str
    title: str | None


class Corpus(ABC):
    """Documents in three splits.

    Attributes:
        name: short, for records and messages.
        note: one line to be printed with every figure obtained on this corpus; mostly empty.
        official_words: published word counts of some splits, ends of lines included.
    """

    name: str
    note: str = ""
    official_words: Mapping[Split, int] = {}

    @abstractmethod
    def check(self) -> None:
        """Look whether the text is there, without reading it.

        Raises:
            ConfigError: it is not; says what was looked for, where, and what helps.
        """

    @abstractmethod
    def read(self, split: Split) -> Iterator[Chunk]:
        """The text of a split in order, a few MiB in memory at most. The first chunk has a title.

        Raises:
            ConfigError: the text is not what it has to be.
        """


def pieces(chunks: Iterable[Chunk], size: int = PIECE) -> Iterator[Chunk]:
    """Whole documents, the longer ones cut into pieces of at most `size` characters.

    A cut stands after the last end of line that `size` allows, failing that after the last white
    space; a run of text without white space is not cut. So no word is cut, the pieces depend on
    the documents alone and not on how they were read, and a document's words and bytes are the
    sums over its pieces. Documents without text are left out.
    """
    title, held, length = None, [], 0
    for chunk in chunks:
        if chunk.title is not None:
            if length:
                yield Chunk("".join(held), title)
            title, held, length = chunk.title, [], 0
        held.append(chunk.text)
        length += len(chunk.text)
        while length > size:
            text = "".join(held)
            cut = _cut(text, size)
            held, length = [text[cut:]], length - cut
            if not cut:
                break
            yield Chunk(text[:cut], title)
            title = None
    if length:
        yield Chunk("".join(held), title)


def _cut(text: str, size: int) -> int:
    """Where to cut a text longer than `size`; 0 where it cannot be cut yet."""
    newline = text.rfind("\n", 0, size)
    if newline >= 0:
        return newline + 1
    head, tail = text[:size], text[size:]
    last_word = "" if head[-1].isspace() else head.rsplit(None, 1)[-1]
    if len(last_word) < size:
        return size - len(last_word)
    first_word = "" if tail[0].isspace() else tail.split(None, 1)[0]
    return size + len(first_word) + 1 if len(first_word) < len(tail) else 0


def count_words(text: str) -> int:
    """Official word count: words between white space, and one more for every end of line."""
    return len(text.split()) + text.count("\n")


def data_root(root: str | None) -> Path | None:
    """The folder with local data: `root`, else the environment's SEQMIX_DATA, else None.

    Raises:
        ConfigError: the folder that is named does not exist.
    """
    given = root if root is not None else os.environ.get("SEQMIX_DATA") or None
    if given is None:
        return None
    path = Path(given).expanduser()
    if not path.is_dir():
        source = "data.root" if root is not None else "SEQMIX_DATA"
        raise ConfigError(f"{source}={given}: no such folder")
    return path


def read_blocks(path: Path, size: int = PIECE) -> Iterator[str]:
    """A UTF-8 file in blocks of `size` characters, as it stands on disk.

    Raises:
        ConfigError: the file is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            while block := file.read(size):
                yield block
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from None
