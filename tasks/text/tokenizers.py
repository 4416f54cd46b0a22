"""Text to token ids and back: words, byte-level BPE, bytes, or a tokenizer.json from disk.

Every tokeniser has one id more than its text needs, the last: the begin-of-document id. No text
contains it, so it is read and never predicted.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from schema.errors import ConfigError

Kind = Literal["word", "bpe", "bytes", "file"]

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
FILE_NAME = "tokenizer.json"
_BYTES = 256


class Tokenizer(ABC):
    """Token ids 0..vocab_size - 2 for text, vocab_size - 1 to begin a document.

    Attributes:
        vocab_size: number of ids.
        unknown: the token that stands for what the vocabulary lacks, and its id; None where every
            text has an encoding of its own.
    """

    vocab_size: int
    unknown: tuple[str, int] | None = None

    @property
    def bos(self) -> int:
        """The id that begins a document."""
        return self.vocab_size - 1

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text, each (n,) int64, without the begin-of-document id."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; the begin-of-document id is left out."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `TokenizerSettings.load` needs into `folder`."""

    @abstractmethod
    def to_library(self) -> tokenizers.Tokenizer:
        """One of the `tokenizers` library with the same ids, without the begin-of-document id."""


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8."""

    vocab_size = _BYTES + 1

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See Tokenizer; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids if i != self.bos).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """See Tokenizer: nothing."""

    def to_library(self) -> tokenizers.Tokenizer:
        """See Tokenizer; a byte-level BPE without merges, id b for byte b."""
        # The library stands for byte b by a printable letter: by chr(b), or where that is none, by
        # the next one from 256 on (GPT-2's table).
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = (b for b in range(_BYTES) if b not in printable)
        letter = {b: chr(b) for b in printable} | {b: chr(_BYTES + i) for i, b in enumerate(others)}
        inner = tokenizers.Tokenizer(models.BPE({c: b for b, c in letter.items()}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        return inner


class VocabularyTokenizer(Tokenizer):
    """A tokeniser of the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        vocabulary = inner.get_vocab()
        if not vocabulary:
            raise ValueError("the vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 2
        name = getattr(inner.model, "unk_token", None)
        self.unknown = (name, vocabulary[name]) if name in vocabulary else None
        self._inner = inner

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer; uses all cores."""
        # The library warns at every later fork that it used threads, unless this says they are
        # wanted. Forked data workers do not tokenise.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See Tokenizer."""
        kept = [int(i) for i in ids if i != self.bos]
        return self._inner.decode(kept, skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """See Tokenizer; the file can be read by the `tokenizers` library."""
        (folder / FILE_NAME).write_text(self._inner.to_str(pretty=True), encoding="utf-8")

    def to_library(self) -> tokenizers.Tokenizer:
        """See Tokenizer; a copy."""
        return tokenizers.Tokenizer.from_str(self._inner.to_str())


def train_word(texts: Iterable[str]) -> VocabularyTokenizer:
    """All words of `texts`, most frequent first; <eos> stands for an end of line.

    A word is what str.split gives, so that tokens are counted as the official word count does.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    for reserved in (UNKNOWN, END_OF_LINE):
        counts.pop(reserved, None)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = {word: i for i, word in enumerate([UNKNOWN, END_OF_LINE, *words])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[\x1c-\x1f]"), " "),  # white space for Python alone
            normalizers.Replace("\n", f" {END_OF_LINE} "),
        ]
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return VocabularyTokenizer(inner)


def train_bpe(texts: Iterable[str], vocab_size: int) -> VocabularyTokenizer:
    """Byte-level BPE (Radford et al. 2019, section 2.2): every text has an exact encoding.

    Args:
        texts: to learn the merges from.
        vocab_size: number of ids, the begin-of-document id included; fewer when the text has not
            as many merges to offer.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return VocabularyTokenizer(inner)


def read_tokenizer(path: Path) -> VocabularyTokenizer:
    """A tokenizer.json of the `tokenizers` library.

    Raises:
        ConfigError: the file cannot be read as one.
    """
    try:
        return VocabularyTokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception for a malformed file
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a tokenizer.json ({reason})") from None


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokeniser, as the configuration says it.

    Attributes:
        kind: "word" (words of the training split), "bpe" (trained on it), "bytes", or "file".
        bpe_vocab_size: number of ids of kind "bpe"; the others have what they have.
        file: the tokenizer.json of kind "file".

    Raises:
        ConfigError: an unknown kind, too small a vocabulary, a file missing or of no use.
    """

    kind: Kind
    bpe_vocab_size: int
    file: str | None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"task.tokenizer={self.kind}: allowed: {', '.join(get_args(Kind))}")
        if self.bpe_vocab_size <= _BYTES:
            raise ConfigError(
                f"task.bpe_vocab_size={self.bpe_vocab_size}: expected more than {_BYTES}, "
                "one id for each byte and one to begin a document"
            )
        if (self.kind == "file") != (self.file is not None):
            raise ConfigError(
                f"task.tokenizer={self.kind} with task.tokenizer_file={self.file or 'null'}: "
                "tokenizer=file needs a tokenizer_file, the others take none"
            )

    @property
    def max_vocab(self) -> int:
        """An upper bound of the number of ids, known without text."""
        bounds = {"bytes": ByteTokenizer.vocab_size, "bpe": self.bpe_vocab_size}
        return bounds.get(self.kind, np.iinfo(np.int32).max)

    def check(self) -> None:
        """Look whether the file is there.

        Raises:
            ConfigError: it is not.
        """
        if self.file is not None and not Path(self.file).expanduser().is_file():
            raise ConfigError(f"task.tokenizer_file={self.file}: no such file")

    def identity(self) -> dict[str, Any]:
        """What the token ids depend on besides the text (plain values)."""
        if self.kind == "bpe":
            return {"kind": "bpe", "vocab_size": self.bpe_vocab_size}
        if self.file is not None:
            content = Path(self.file).expanduser().read_bytes()
            return {"kind": "file", "file_sha256": hashlib.sha256(content).hexdigest()}
        return {"kind": self.kind}

    def make(self, training_texts: Iterable[str]) -> Tokenizer:
        """The tokeniser; kinds "word" and "bpe" learn it from `training_texts`."""
        if self.kind == "word":
            return train_word(training_texts)
        if self.kind == "bpe":
            return train_bpe(training_texts, self.bpe_vocab_size)
        if self.file is not None:
            return read_tokenizer(Path(self.file).expanduser())
        return ByteTokenizer()

    def load(self, folder: Path) -> Tokenizer:
        """The tokeniser that `make` gave, from where it was saved."""
        return ByteTokenizer() if self.kind == "bytes" else read_tokenizer(folder / FILE_NAME)
