"""Any local text files as a corpus."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from schema.errors import ConfigError
from tasks.base import SPLITS, Split
from tasks.text.corpus import Chunk, Corpus, read_blocks


class TextFiles(Corpus):
    """UTF-8 files, one after the other: the first part to train, the last two to validate and test.

    The text is divided by its bytes, at the first line that starts at or after the fraction: a
    document that lies across such a place is two documents.

    Args:
        files: paths, in the order of the text; a pattern (*, ?, **) stands for its matches in
            alphabetical order.
        validation: fraction of the text to validate on.
        test: fraction of the text, the last, to be scored on.
        separator: string that ends a document and stays part of it; None makes every file a
            document.

    Raises:
        ConfigError: no file, fractions that leave nothing to train on, or an empty separator.
    """

    name = "text"

    def __init__(
        self,
        files: Sequence[str],
        validation: float = 0.05,
        test: float = 0.05,
        separator: str | None = None,
    ) -> None:
        if isinstance(files, str) or not files:
            raise ConfigError(f"files={files or '[]'}: expected a list of text files, not empty")
        if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
            raise ConfigError(
                f"task.corpus.validation={validation}, task.corpus.test={test}: expected two "
                "fractions above 0 whose sum is below 1"
            )
        if separator == "":
            raise ConfigError("task.corpus.separator='': expected a string or null")
        self.files = list(files)
        self.validation, self.test = validation, test
        self.separator = separator

    def check(self) -> None:
        """See Corpus."""
        self._paths()

    def read(self, split: Split) -> Iterator[Chunk]:
        """See Corpus."""
        for owner, chunk in self._divided():
            if owner == split:
                yield chunk

    def _paths(self) -> list[Path]:
        paths = []
        for pattern in self.files:
            name = str(Path(pattern).expanduser())
            found = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
            matches = [Path(each) for each in found if Path(each).is_file()]
            if not matches:
                raise ConfigError(f"files: no file {pattern} (looked from {Path.cwd()})")
            paths.extend(matches)
        return paths

    def _divided(self) -> Iterator[tuple[Split, Chunk]]:
        """Every chunk with the split that it belongs to."""
        paths = self._paths()
        total = sum(path.stat().st_size for path in paths)
        starts = [total * (1 - self.validation - self.test), total * (1 - self.test)]
        pending = [round(start) for start in starts]  # bytes at which the next splits may start
        splits = iter(SPLITS)
        split, position, title = next(splits), 0, ""
        for text, new_title in self._documents(paths):
            opens = new_title is not None
            title = new_title if opens else title
            data = text.encode()
            while pending and pending[0] <= position + len(data):
                at_document = opens and pending[0] <= position
                newline = data.find(b"\n", max(0, pending[0] - position - 1))
                if not at_document and newline < 0:
                    break  # the line goes on in a later chunk
                cut = 0 if at_document else newline + 1
                yield split, Chunk(data[:cut].decode(), title if opens else None)
                pending.pop(0)
                split, opens = next(splits), True
                position, data = position + cut, data[cut:]
            yield split, Chunk(data.decode(), title if opens else None)
            position += len(data)

    def _documents(self, paths: Iterable[Path]) -> Iterator[Chunk]:
        for path in paths:
            blocks = read_blocks(path)
            if self.separator is None:
                for i, block in enumerate(blocks):
                    yield Chunk(block, str(path) if i == 0 else None)
            else:
                yield from _separated(blocks, self.separator, str(path))


def _separated(blocks: Iterable[str], separator: str, name: str) -> Iterator[Chunk]:
    """The documents that end with `separator`, titled name#1, name#2 and so on."""
    number, opens, held = 1, True, ""
    for block in blocks:
        *complete, held = (held + block).split(separator)
        for text in complete:
            yield Chunk(text + separator, f"{name}#{number}" if opens else None)
            number, opens = number + 1, True
        sure = len(held) - len(separator) + 1  # what follows may be the start of a separator
        if sure > 0:
            yield Chunk(held[:sure], f"{name}#{number}" if opens else None)
            opens, held = False, held[sure:]
    yield Chunk(held, f"{name}#{number}" if opens else None)
