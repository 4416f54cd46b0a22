"""WikiText-2 and WikiText-103 (Merity et al. 2016, "Pointer Sentinel Mixture Models").

From the official files, or through `datasets`. A document is an article.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from schema.errors import ConfigError
from tasks.base import SPLITS, Split
from tasks.text import hub
from tasks.text.corpus import Chunk, Corpus, data_root

Variant = Literal["wikitext-2", "wikitext-2-raw", "wikitext-103", "wikitext-103-raw"]

_FILE_SPLIT = {"train": "train", "validation": "valid", "test": "test"}
_HEADING = re.compile(r" = (?!= )(?P<title>.*[^= ]) =\s*")
_OFFICIAL_WORDS: dict[str, dict[Split, int]] = {
    "wikitext-2": {"train": 2_088_628, "validation": 217_646, "test": 245_569},
    "wikitext-103": {"train": 103_227_021, "validation": 217_646, "test": 245_569},
}


class WikiText(Corpus):
    """The four official corpora.

    Args:
        variant: which; "-raw" is the text before rare words became <unk>.
        root: folder with `<variant>/wiki.{train,valid,test}.tokens` (`.raw` for the raw ones), or
            with these files themselves. None takes the environment's SEQMIX_DATA. When the files
            are not there the corpus comes through `datasets`.

    Raises:
        ConfigError: an unknown variant.
    """

    def __init__(self, variant: Variant, root: str | None = None) -> None:
        if variant not in get_args(Variant):
            raise ConfigError(
                f"task.corpus.variant={variant}: allowed: {', '.join(get_args(Variant))}"
            )
        self.name = self.variant = variant
        self.root = root
        self.official_words = _OFFICIAL_WORDS.get(variant, {})

    def check(self) -> None:
        """See Corpus; asks the hub only when the official files are missing."""
        self._require(SPLITS)

    def read(self, split: Split) -> Iterator[Chunk]:
        """See Corpus."""
        return articles(self._lines(split))

    def _require(self, splits: Iterable[Split]) -> None:
        missing = [self._file_name(split) for split in splits if self._file(split) is None]
        if not missing:
            return
        config = f"{self.variant}-v1"
        try:
            hub.check(config)
        except hub.UnavailableError as error:
            folders = " or ".join(map(str, self._folders())) or "no folder (none is set)"
            small = missing == ["wiki.train.tokens"] and self.variant == "wikitext-2"
            raise ConfigError(
                f"data.root={self.root or 'null'}: {self.variant} is not here: looked for "
                f"{', '.join(missing)} in {folders}; put the official files there and name the "
                "folder with data.root= or the environment variable SEQMIX_DATA, or load it "
                f"through the datasets library ({hub.REPOSITORY}, {config}): {error}"
                + ("; task=wikitext_small does without the training file" if small else "")
            ) from None

    def _lines(self, split: Split) -> Iterator[str]:
        """Lines with their ends, from the official file or the hub."""
        path = self._file(split)
        if path is None:
            self._require([split])
            yield from (row or " \n" for row in hub.rows(f"{self.variant}-v1", split))
            return
        try:
            with path.open(encoding="utf-8", newline="\n") as file:
                yield from file
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from None

    def _file_name(self, split: Split) -> str:
        return f"wiki.{_FILE_SPLIT[split]}.{'raw' if self.variant.endswith('raw') else 'tokens'}"

    def _file(self, split: Split) -> Path | None:
        files = (folder / self._file_name(split) for folder in self._folders())
        return next((file for file in files if file.is_file()), None)

    def _folders(self) -> list[Path]:
        root = data_root(self.root)
        return [] if root is None else [root / self.variant, root]


class WikiTextSmall(WikiText):
    """WikiText-2 for machines without its training file.

    Trains on the first 54 articles of the official validation file, validates on its last 6 and
    is scored on the official test file.

    Args:
        root: as in WikiText.
    """

    note = (
        "wikitext_small: trained on the first 54 articles of WikiText-2's validation file, "
        "validated on its last 6, scored on the official test file"
    )
    _articles, _train_articles = 60, 54

    def __init__(self, root: str | None = None) -> None:
        super().__init__("wikitext-2", root)
        self.name = "wikitext_small"
        self.official_words = {"test": self.official_words["test"]}

    def check(self) -> None:
        """See Corpus."""
        self._require(("validation", "test"))

    def read(self, split: Split) -> Iterator[Chunk]:
        """See Corpus."""
        if split == "test":
            yield from super().read("test")
            return
        count = 0
        for chunk in super().read("validation"):
            count += chunk.title is not None
            if (count <= self._train_articles) == (split == "train"):
                yield chunk
        if count != self._articles:
            raise ConfigError(
                f"{self._file_name('validation')} has {count} articles; "
                f"the official file has {self._articles}"
            )


def articles(lines: Iterable[str]) -> Iterator[Chunk]:
    """The lines of a WikiText file as chunks of which the first of every article has its title.

    An article starts at the empty line before a heading of level one, " = Title = ", that has an
    empty line after it too: lines of the same form stand inside formulas and tables. Text before
    the first heading is an article without a title.
    """
    chunks = _headed(lines)
    for first in chunks:
        yield first._replace(title=first.title or "")
        yield from chunks


def _headed(lines: Iterable[str]) -> Iterator[Chunk]:
    empty: str | None = ""  # the empty line before; the start of the file counts as one
    heading: str | None = None  # a line that is a heading if the next one is empty
    for line in lines:
        is_empty = not line.strip()
        if heading is not None:
            yield Chunk(f"{empty}{heading}", _title(heading) if is_empty else None)
            empty = heading = None
        if empty is not None and _title(line) is not None:
            heading = line
            continue
        if empty:
            yield Chunk(empty, None)
        empty = line if is_empty else None
        if not is_empty:
            yield Chunk(line, None)
    yield Chunk(f"{empty or ''}{heading or ''}", None)


def _title(line: str) -> str | None:
    match = _HEADING.fullmatch(line) if line.startswith(" = ") else None
    return match["title"] if match else None
