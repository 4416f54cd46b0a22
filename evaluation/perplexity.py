"""What is reported of a scored text: perplexities and bits per byte, from sums per document."""

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class DocumentScore:
    """One document: its summed negative log-likelihood in nats and what that is divided by.

    `tokens` were predicted (all but the one the document starts with and a prefix that is only
    read), `words` are the official words, ends of lines included, `bytes` are of its text in
    UTF-8. `hits` of the tokens, with `hit_nll` of the nats, are AR hits (evaluation/ar_hits.py).
    """

    title: str
    nll: float
    tokens: int
    words: int
    bytes: int
    hits: int = 0
    hit_nll: float = 0.0


@dataclass(frozen=True)
class TextScore:
    """A text under one protocol; `documents` in the order of the text.

    `window` (None: as long as each document) and `stride` are set for "windowed", `chunk` is set
    for "carried". With a `prefix` the first tokens of each document were read and not predicted.
    `sliced` says that AR hits were looked for.
    """

    protocol: Literal["windowed", "carried"]
    documents: tuple[DocumentScore, ...]
    window: int | None = None
    stride: int | None = None
    chunk: int | None = None
    prefix: int = 0
    sliced: bool = False

    @property
    def nll(self) -> float:
        """Nats over all documents."""
        return math.fsum(document.nll for document in self.documents)

    @property
    def tokens(self) -> int:
        """Tokens that were predicted."""
        return sum(document.tokens for document in self.documents)

    @property
    def words(self) -> int:
        """Official words."""
        return sum(document.words for document in self.documents)

    @property
    def bytes(self) -> int:
        """Bytes of text."""
        return sum(document.bytes for document in self.documents)

    @property
    def ar_slices(self) -> dict[str, dict[str, float | int | None]]:
        """Tokens, nats and perplexity of AR hits and of all others; empty unless `sliced`."""
        if not self.sliced:
            return {}
        hits = sum(document.hits for document in self.documents)
        nll = math.fsum(document.hit_nll for document in self.documents)
        parts = {"ar_hits": (hits, nll), "others": (self.tokens - hits, self.nll - nll)}
        return {
            name: {"tokens": n, "nll": x, "token_perplexity": _exp(x / n) if n else None}
            for name, (n, x) in parts.items()
        }

    @property
    def context(self) -> str:
        """From how many tokens before it a token is predicted, where its document has them."""
        behind = f", behind a prefix of {self.prefix}" if self.prefix else ""
        if self.window is None or self.stride is None:
            return f"whole document{behind}"
        return f"{max(1, self.window - self.stride)}-{self.window} tokens{behind}"

    def summary(self) -> dict[str, Any]:
        """The figures and how they were obtained, without the documents."""
        return {
            "protocol": self.protocol,
            "window": self.window,
            "stride": self.stride,
            "chunk": self.chunk,
            "prefix": self.prefix,
            "context": self.context,
            "nll": self.nll,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "ar_slices": self.ar_slices,
            **rates(self.nll, self.tokens, self.words, self.bytes, whole=self.prefix == 0),
        }


def rates(
    nll: float, tokens: int, words: int, bytes: int, *, whole: bool = True
) -> dict[str, float | None]:
    """Token perplexity, word perplexity and bits per byte of `nll` nats.

    Word perplexity divides the same sum by the official word count, so that it can be compared
    across tokenisers. It and bits per byte are None unless the `whole` text was predicted.
    """
    return {
        "token_perplexity": _exp(nll / tokens),
        "word_perplexity": _exp(nll / words) if whole else None,
        "bits_per_byte": nll / math.log(2) / bytes if whole else None,
    }


def _exp(x: float) -> float:
    """exp, infinite where a float cannot hold it: a model that diverged has a perplexity too."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
