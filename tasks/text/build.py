"""From a corpus to a store: hashed, tokenised and written as a stream, once."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from schema.errors import ConfigError
from tasks.base import SPLITS, Split
from tasks.text.corpus import PIECE, Chunk, Corpus, count_words, pieces
from tasks.text.store import FORMAT, DamagedError, Store, digest, write_manifest, write_table
from tasks.text.tokenizers import Tokenizer, TokenizerSettings

_BATCH = 4 * PIECE  # characters tokenised at once; the library needs some 100 bytes per token
_console = Console(stderr=True)


@dataclass(frozen=True)
class Fingerprint:
    """What a split is: `sha256` of its text alone, `layout` of its documents' titles and sizes."""

    sha256: str
    layout: str
    documents: int
    bytes: int


class _Fingerprinter:
    """Takes the pieces of a split in order."""

    def __init__(self) -> None:
        self._text, self._layout = hashlib.sha256(), hashlib.sha256()
        self._documents = self._bytes = 0

    def add(self, piece: Chunk) -> int:
        """Returns the bytes of the piece."""
        data = piece.text.encode()
        self._text.update(data)
        self._layout.update(json.dumps([piece.title, len(data)]).encode())
        self._documents += piece.title is not None
        self._bytes += len(data)
        return len(data)

    def result(self) -> Fingerprint:
        return Fingerprint(
            self._text.hexdigest(), self._layout.hexdigest(), self._documents, self._bytes
        )


def open_or_build(corpus: Corpus, settings: TokenizerSettings, cache: Path) -> Store:
    """The store of a corpus under a tokeniser; built if it is not there, or is damaged.

    Its name holds a hash of the text, its division into documents, the tokeniser's settings and
    the store's format. Of several processes that need it one builds and the others wait.

    Raises:
        ConfigError: an empty split, a text that cannot be read or a cache that cannot be written.
    """
    prints: dict[Split, Fingerprint] = {s: _fingerprint(corpus, s) for s in SPLITS}
    parts = [FORMAT, {s: asdict(p) for s, p in prints.items()}, settings.identity()]
    folder = cache / f"{corpus.name}-{settings.kind}-{digest(parts)[:16]}"
    with suppress(DamagedError):
        return Store(folder, settings)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock").acquire()
    except OSError as error:
        raise ConfigError(f"data.cache={cache}: cannot be written ({error.strerror})") from None
    with lock:
        if folder.exists():
            try:
                return Store(folder, settings)
            except DamagedError as error:
                _say(f"{folder} is damaged ({error}): building it again")
                shutil.rmtree(folder)
        unfinished = Path(f"{folder}.building")  # of a process that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _build(unfinished, corpus, settings, prints)
        unfinished.rename(folder)
        return Store(folder, settings)


def _fingerprint(corpus: Corpus, split: Split) -> Fingerprint:
    found = _Fingerprinter()
    for piece in pieces(corpus.read(split)):
        found.add(piece)
    if not found.result().documents:
        raise ConfigError(f"{corpus.name}: the {split} split is empty")
    return found.result()


def _build(
    folder: Path, corpus: Corpus, settings: TokenizerSettings, prints: dict[Split, Fingerprint]
) -> None:
    size = sum(p.bytes for p in prints.values())
    learns = settings.kind in ("word", "bpe")
    total = size + learns * prints["train"].bytes
    with _progress(f"{corpus.name}, {size / 1e6:.1f} MB: tokenising", total) as advance:

        def watched(split: Split) -> Iterator[Chunk]:
            """The pieces of a split; they must be those that the store's name was made from."""
            found = _Fingerprinter()
            for piece in pieces(corpus.read(split)):
                advance(found.add(piece))
                yield piece
            if found.result() != prints[split]:
                raise ConfigError(f"{corpus.name}: the {split} split changed while it was read")

        tokenizer = settings.make(piece.text for piece in watched("train"))
        tokenizer.save(folder)
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        facts: dict[Split, dict[str, Any]] = {}
        for split in SPLITS:
            # Only a tokeniser from elsewhere may lose text, and only scored text matters.
            verify = settings.kind == "file" and split != "train"
            writer = _Writer(tokenizer, dtype, verify)
            writer.write(folder, split, watched(split))
            facts[split] = {"sha256": prints[split].sha256, **writer.facts()}
    write_manifest(folder, dtype, facts)


@dataclass
class _Writer:
    """Tokenises one split, piece by piece, and counts."""

    tokenizer: Tokenizer
    dtype: str
    verify: bool
    offsets: list[int] = field(default_factory=lambda: [0])
    words: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    oov: int = 0
    unfaithful: int = 0

    def write(self, folder: Path, split: Split, stream: Iterator[Chunk]) -> None:
        with (folder / f"{split}.tokens").open("wb") as file:
            for batch in _batches(stream):
                encoded = self.tokenizer.encode_batch([piece.text for piece in batch])
                for piece, ids in zip(batch, encoded, strict=True):
                    self._add(file, piece, ids)
        columns = (self.offsets, self.words, self.bytes, self.titles)
        write_table(folder / f"{split}.documents.npz", *columns)

    def _add(self, file: BinaryIO, piece: Chunk, ids: np.ndarray) -> None:
        if piece.title is not None:
            self.titles.append(piece.title)
            self.offsets.append(self.offsets[-1])
            self.words.append(0)
            self.bytes.append(0)
            ids = np.concatenate([[self.tokenizer.bos], ids])
        file.write(ids.astype(self.dtype).tobytes())
        self.offsets[-1] += len(ids)
        self.words[-1] += count_words(piece.text)
        self.bytes[-1] += len(piece.text.encode())
        if self.tokenizer.unknown is not None:
            name, unknown = self.tokenizer.unknown
            # What the text itself marks as unknown is in the vocabulary.
            self.oov += int((ids == unknown).sum()) - piece.text.split().count(name)
        if self.verify:
            self.unfaithful += self.tokenizer.decode(ids) != piece.text

    def facts(self) -> dict[str, Any]:
        tokens = self.offsets[-1] - len(self.words)
        return {
            "documents": len(self.words),
            "tokens": tokens,
            "words": sum(self.words),
            "bytes": sum(self.bytes),
            "oov_tokens": self.oov,
            "oov_rate": self.oov / max(tokens, 1),
            "unfaithful_pieces": self.unfaithful if self.verify else None,
        }


def _batches(stream: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    batch, length = [], 0
    for piece in stream:
        batch.append(piece)
        length += len(piece.text)
        if length >= _BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else one line."""
    if not _console.is_terminal:
        _say(title)
        yield lambda done: None
        return
    with Progress(console=_console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def _say(line: str) -> None:
    _console.print(line, markup=False, highlight=False, soft_wrap=True)
