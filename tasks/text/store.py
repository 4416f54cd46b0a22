"""Tokenised text on disk: memory-mapped ids and a table of documents, found by content.

A store is a folder that appears complete, by a rename, and is verified whenever it is opened.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import SPLITS, Document, Split
from tasks.text.tokenizers import Tokenizer, TokenizerSettings

FORMAT = 1  # of the folder; another number is another store
MANIFEST = "manifest.json"
_TABLE = ("offsets", "words", "bytes", "titles")


class DamagedError(Exception):
    """A store is incomplete or is not what was written; the message says where."""


class SplitTokens(Sequence[Document]):
    """The documents of one split, and all their ids in one row.

    Attributes:
        offsets: int64 (D + 1,), document d is tokens[offsets[d] : offsets[d + 1]] and starts with
            the begin-of-document id.
        words, bytes: int64 (D,), see Document.
        titles: str (D,).
    """

    def __init__(self, folder: Path, split: Split, dtype: str) -> None:
        self._path, self._dtype = folder / f"{split}.tokens", dtype
        with np.load(folder / f"{split}.documents.npz") as table:
            self.offsets, self.words, self.bytes, self.titles = (table[name] for name in _TABLE)
        self._map: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """All ids, memory-mapped and read-only."""
        if self._map is None:
            self._map = np.memmap(self._path, self._dtype, mode="r")
        return self._map

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        ids = self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)
        return Document(ids, int(self.words[i]), int(self.bytes[i]), str(self.titles[i]))

    def __getstate__(self) -> dict[str, Any]:
        # A data worker that is spawned maps the file itself; pickling the map would copy it.
        return {**self.__dict__, "_map": None}


class Store:
    """A tokenised corpus.

    Attributes:
        folder: where it is.
        tokenizer: decodes it.
        facts: of every split, as they were when it was built.
        files: size and SHA-256 of every file.

    Raises:
        DamagedError: a file is missing, has another size or other content than was written.
    """

    def __init__(self, folder: Path, settings: TokenizerSettings) -> None:
        manifest = _read_manifest(folder / MANIFEST)
        for name, written in manifest["files"].items():
            _verify(folder / name, written)
        self.folder = folder
        self.tokenizer: Tokenizer = settings.load(folder)
        self.facts: dict[Split, dict[str, Any]] = manifest["splits"]
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        self._splits = {split: SplitTokens(folder, split, manifest["dtype"]) for split in SPLITS}

    def __getitem__(self, split: Split) -> SplitTokens:
        return self._splits[split]


def write_table(path: Path, offsets: list, words: list, bytes: list, titles: list) -> None:
    """The documents of a split, as SplitTokens reads them."""
    table = [np.array(column, np.int64) for column in (offsets, words, bytes)]
    np.savez(path, **dict(zip(_TABLE, [*table, np.array(titles, np.str_)], strict=True)))


def write_manifest(folder: Path, dtype: str, splits: dict[Split, dict[str, Any]]) -> None:
    """The last file of a store: what all the others are."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    }
    content = {"format": FORMAT, "dtype": dtype, "splits": splits, "files": files}
    text = json.dumps({**content, "sha256": digest(content)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def digest(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = content.pop("sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path.name} is missing") from None
    except (ValueError, KeyError, AttributeError):
        raise DamagedError(f"{path.name} cannot be read") from None
    if digest(content) != written:
        raise DamagedError(f"{path.name} is not what was written")
    return content


def _verify(path: Path, written: dict[str, Any]) -> None:
    if not path.is_file():
        raise DamagedError(f"{path.name} is missing")
    size = path.stat().st_size
    if size != written["bytes"]:
        raise DamagedError(f"{path.name} has {size} bytes, {written['bytes']} were written")
    if sha256(path) != written["sha256"]:
        raise DamagedError(f"{path.name} is not what was written")
