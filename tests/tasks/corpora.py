"""Corpora for tests: texts in memory, and WikiText's official layout on disk."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tasks.base import SPLITS, Recipe, Split
from tasks.text.corpus import Chunk, Corpus
from tasks.text.task import LanguageModelling

OFFICIAL = os.environ.get("SEQMIX_DATA")
needs_official = pytest.mark.skipif(
    OFFICIAL is None, reason="SEQMIX_DATA names no folder with wikitext-2/wiki.valid.tokens"
)
RECIPE = Recipe(batch_size=2, max_steps=10, lr=1e-3)


class Texts(Corpus):
    """Documents given as strings."""

    name = "texts"

    def __init__(self, splits: Mapping[Split, Sequence[str]]) -> None:
        self.splits = splits

    def check(self) -> None:
        """The texts are always there."""

    def read(self, split: Split) -> Iterator[Chunk]:
        for i, text in enumerate(self.splits[split]):
            yield Chunk(text, f"{split} {i}")


SMALL: dict[Split, list[str]] = {
    "train": ["the cat sat\non the mat\n", "a dog\n", "the mat sat on a cat \n\n"],
    "validation": ["the dog sat\n"],
    "test": ["a cat on a log\n", "naïve 🐈 <unk>\n"],
}


def small_task(cache: Path, splits: Mapping[Split, Sequence[str]] = SMALL, **options):
    """A task over texts in memory with windows of four tokens."""
    options = {"tokenizer": "bytes", "seq_len": 4, **options}
    return LanguageModelling(Texts(splits), RECIPE, cache=str(cache), **options)


def article(title: str, body: str) -> str:
    """An article as the official files have it."""
    return f" \n = {title} = \n \n {body} \n"


def write_wikitext(root: Path, texts: Mapping[Split, str], variant: str = "wikitext-2") -> None:
    """The official layout under `root`."""
    (root / variant).mkdir(parents=True)
    ending = "raw" if variant.endswith("raw") else "tokens"
    names = dict(zip(SPLITS, ("train", "valid", "test"), strict=True))
    for split, text in texts.items():
        path = root / variant / f"wiki.{names[split]}.{ending}"
        path.write_text(text, encoding="utf-8", newline="")
