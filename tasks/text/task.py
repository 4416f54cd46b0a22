"""Language modelling as a task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from schema.errors import ConfigError
from tasks.base import SPLITS, Document, Recipe, Split, Task, as_record
from tasks.text.build import open_or_build
from tasks.text.corpus import Corpus
from tasks.text.store import Store
from tasks.text.tokenizers import Kind, TokenizerSettings
from tasks.text.unigram import unigram_nll
from tasks.text.windows import Windows

CACHE = ".seqmix_cache"  # in the current folder


class LanguageModelling(Task):
    """Predict the next token of a corpus.

    A document is encoded as the begin-of-document id and its tokens. Its text has an exact
    encoding under "bpe" and "bytes"; under "word" a word outside the training vocabulary is
    <unk>, which makes a text easier to predict, so that the rate of these is in `facts`.

    Args:
        corpus: the text.
        recipe: see Task.
        tokenizer: "word" (every word of the training split, <eos> for an end of line), "bpe"
            (byte-level, trained on the training split), "bytes", or "file".
        bpe_vocab_size: number of ids of the tokenizer "bpe".
        tokenizer_file: the tokenizer.json of the tokenizer "file".
        seq_len: tokens of a training window. What fills no window at the end of the training
            split is not trained on; in validation every token is counted.
        documents: "separate" keeps documents apart by `segments`, "concatenated" lets a window
            read across their borders.
        cache: folder of tokenised corpora; None is .seqmix_cache in the current folder.

    Raises:
        ConfigError: an option that is not allowed.
    """

    kind = "text"

    def __init__(
        self,
        corpus: Corpus,
        recipe: Recipe,
        *,
        tokenizer: Kind = "bpe",
        bpe_vocab_size: int = 8192,
        tokenizer_file: str | None = None,
        seq_len: int = 512,
        documents: Literal["separate", "concatenated"] = "separate",
        cache: str | None = None,
    ) -> None:
        if seq_len < 1:
            raise ConfigError(f"task.seq_len={seq_len}: expected at least 1")
        if documents not in ("separate", "concatenated"):
            raise ConfigError(f"task.documents={documents}: allowed: separate, concatenated")
        self.name, self.note = corpus.name, corpus.note
        self.corpus = corpus
        self.recipe = as_record(Recipe, recipe, "task.recipe")
        self.settings = TokenizerSettings(tokenizer, bpe_vocab_size, tokenizer_file)
        self.seq_len = seq_len
        self.separate = documents == "separate"
        self.cache = Path(CACHE if cache is None else cache).expanduser()
        self._store: Store | None = None

    def check(self) -> None:
        """See Task."""
        self.settings.check()
        self.corpus.check()

    def prepare(self) -> None:
        """See Task; tokenises the corpus unless the cache has it."""
        if self._store is not None:
            return
        self.settings.check()
        store = open_or_build(self.corpus, self.settings, self.cache)
        tokens = len(store["train"].tokens)
        if tokens <= self.seq_len:
            raise ConfigError(
                f"task.seq_len={self.seq_len}: the training split of {self.name} has {tokens} "
                "tokens, fewer than one window and its last label need"
            )
        self._store = store

    @property
    def store(self) -> Store:
        """The tokenised corpus.

        Raises:
            RuntimeError: before `prepare`.
        """
        if self._store is None:
            raise RuntimeError("prepare() has to come first")
        return self._store

    @property
    def vocab_size(self) -> int:
        """See Task."""
        return self.store.tokenizer.vocab_size

    @property
    def max_vocab(self) -> int:
        """See Task."""
        return self.settings.max_vocab

    def train_set(self) -> Windows:
        """See Task."""
        return self._windows("train", drop_last=True)

    def validation_set(self) -> Windows:
        """See Task."""
        return self._windows("validation", drop_last=False)

    def documents(self, split: Split) -> Sequence[Document]:
        """The documents of a split, in the order of the text."""
        return self.store[split]

    def unigram_nll(self, split: Split) -> np.ndarray:
        """Nats of every document of a split under the training split's token frequencies, (D,)."""
        return unigram_nll(self.store["train"], self.store[split], self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 (n,), without the begin-of-document id."""
        return self.store.tokenizer.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; the begin-of-document id is left out."""
        return self.store.tokenizer.decode(ids)

    @property
    def bos(self) -> int:
        """The begin-of-document id."""
        return self.store.tokenizer.bos

    def facts(self) -> dict[str, Any]:
        """See Task."""
        official = self.corpus.official_words
        return {
            "name": self.name,
            "kind": self.kind,
            "note": self.note,
            "notes": self._notes(),
            "tokenizer": {
                **self.settings.identity(),
                "vocab_size": self.vocab_size,
                "bos": self.bos,
                "sha256": self.store.files.get("tokenizer.json", {}).get("sha256"),
                "library": tokenizers.__version__,
            },
            "seq_len": self.seq_len,
            "documents": "separate" if self.separate else "concatenated",
            "splits": {
                split: {**facts, "official_words": official.get(split)}
                for split, facts in self.store.facts.items()
            },
        }

    def _windows(self, split: Split, *, drop_last: bool) -> Windows:
        return Windows(
            self.store[split], self.seq_len, self.bos, separate=self.separate, drop_last=drop_last
        )

    def _notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        notes = []
        for split in SPLITS:
            facts = self.store.facts[split]
            official = self.corpus.official_words.get(split, facts["words"])
            if facts["words"] != official:
                notes.append(f"{split}: {facts['words']} words; the official text has {official}")
            if facts["oov_tokens"]:
                notes.append(
                    f"{split}: {facts['oov_rate']:.2%} of the tokens are outside the vocabulary "
                    "and count as unknown, which makes perplexity look better than it is"
                )
            if facts["unfaithful_pieces"]:
                notes.append(
                    f"{split}: the tokeniser does not give back the text of "
                    f"{facts['unfaithful_pieces']} pieces, so that bits per byte and word "
                    "perplexity are of another text"
                )
        return notes
