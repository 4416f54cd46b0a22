"""Questions about a text, in words, for models that read one: passkey, needles, phone book.

The texts themselves stand in conf/probe/. A question comes with the context that answers it, so
that it can be asked after the context was shown once or more (JRT-Prompt).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np

from schema.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """What is known, what is asked, and the answer, of which nothing but digits counts.

    `slice` and `groups` are names under which questions are scored together.
    """

    context: str
    question: str
    answer: str
    slice: str
    groups: tuple[str, ...] = ()


class Probe(ABC):
    """A set of questions, made from a seed.

    Attributes:
        name: short, for records and messages.
    """

    name: str

    def __init__(self, samples: int, seed: int) -> None:
        _at_least(1, samples=samples)
        _at_least(0, seed=seed)
        self.samples, self.seed = samples, seed

    @abstractmethod
    def questions(self) -> Iterator[Question]:
        """All questions, slice after slice; the same ones whenever it is called."""

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=stream))


class Passkey(Probe):
    """A number in filler ("Landmark attention", Mohtashami and Jaggi 2023).

    Args:
        instruction: the first line.
        filler: sentences that are repeated.
        statement: says the number; with {key}.
        question: asks for it, up to where the number begins.
        words: lengths of the filler.
        depths: how much of the filler stands before the number, in percent.
        samples: questions of each length and depth.
        largest: numbers are 1..largest.
        seed: of the questions.

    Raises:
        ConfigError: an option out of its range, or a text without its place.
    """

    name = "passkey_text"

    def __init__(
        self,
        instruction: str,
        filler: str,
        statement: str,
        question: str,
        words: Sequence[int],
        depths: Sequence[float],
        *,
        samples: int = 10,
        largest: int = 50000,
        seed: int = 0,
    ) -> None:
        super().__init__(samples, seed)
        _places(statement=(statement, {"key"}))
        _at_least(1, largest=largest, **{f"words[{i}]": n for i, n in enumerate(words)})
        for depth in depths:
            if not 0 <= depth <= 100:
                raise ConfigError(f"probe.depths={depth}: expected 0 to 100 percent")
        self.instruction, self.filler = instruction, filler
        self.statement, self.question = statement, question
        self.words, self.depths, self.largest = list(words), list(depths), largest

    def questions(self) -> Iterator[Question]:
        """See Probe."""
        for w, count in enumerate(self.words):
            filler = (self.filler.split() * (count // len(self.filler.split()) + 1))[:count]
            for d, depth in enumerate(self.depths):
                before = round(depth / 100 * count)
                for key in self._rng(w, d).integers(1, self.largest + 1, size=self.samples):
                    parts = [filler[:before], [self.statement.format(key=key)], filler[before:]]
                    text = " ".join(word for part in parts for word in part)
                    yield Question(
                        f"{self.instruction} {text}",
                        self.question,
                        str(key),
                        f"W{count}_D{depth:g}",
                        (f"W{count}", f"D{depth:g}"),
                    )


class Needles(Probe):
    """Several numbers in filler, one of which is asked for (after RULER, Hsieh et al. 2024).

    Args:
        filler: sentences that are repeated.
        statement: says a number; with {key} and {value}.
        question: asks for one, up to where the number begins; with {key}.
        keys: what numbers belong to.
        words: lengths of the filler.
        needles: how many numbers there are.
        samples: questions of each length and number of needles.
        seed: of the questions.

    Raises:
        ConfigError: an option out of its range, or a text without its place.
    """

    name = "needle_text"

    def __init__(
        self,
        filler: str,
        statement: str,
        question: str,
        keys: Sequence[str],
        words: Sequence[int],
        needles: Sequence[int],
        *,
        samples: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(samples, seed)
        _places(statement=(statement, {"key", "value"}), question=(question, {"key"}))
        _at_least(1, **{f"words[{i}]": n for i, n in enumerate(words)})
        for count in needles:
            if not 1 <= count <= len(keys):
                raise ConfigError(
                    f"probe.needles={count}: expected 1 to {len(keys)}, as many as keys"
                )
        self.filler, self.statement, self.question = filler, statement, question
        self.keys, self.words, self.needles = list(keys), list(words), list(needles)

    def questions(self) -> Iterator[Question]:
        """See Probe."""
        for w, count in enumerate(self.words):
            filler = (self.filler.split() * (count // len(self.filler.split()) + 1))[:count]
            for n, needles in enumerate(self.needles):
                rng = self._rng(w, n)
                for _ in range(self.samples):
                    keys = rng.choice(self.keys, needles, replace=False)
                    values = rng.integers(10000, 100000, size=needles)
                    text = list(filler)
                    for place, key, value in sorted(
                        zip(rng.integers(count + 1, size=needles), keys, values, strict=True),
                        key=lambda needle: -needle[0],
                    ):
                        text.insert(place, self.statement.format(key=key, value=value))
                    yield Question(
                        " ".join(text),
                        self.question.format(key=keys[0]),
                        str(values[0]),
                        f"W{count}_K{needles}",
                        (f"W{count}", f"K{needles}"),
                    )


class PhoneBook(Probe):
    """A number from a phone book (Jelassi et al. 2024, "Repeat after me", section 4.3).

    Lines are "First Last: NNN-NNN-NNNN"; behind the book two of them stand again as examples, then
    another name and a colon.

    Args:
        first, last: names to draw from.
        entries: lines of the book.
        samples: questions of each book.
        seed: of the questions.

    Raises:
        ConfigError: an option out of its range, or too few names.
    """

    name = "phonebook_text"

    def __init__(
        self,
        first: Sequence[str],
        last: Sequence[str],
        entries: Sequence[int],
        *,
        samples: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(samples, seed)
        for count in entries:
            if not 3 <= count <= len(first) * len(last):
                raise ConfigError(
                    f"probe.entries={count}: expected 3 to {len(first) * len(last)}, as many as "
                    "pairs of names"
                )
        self.first, self.last, self.entries = list(first), list(last), list(entries)

    def questions(self) -> Iterator[Question]:
        """See Probe."""
        for e, count in enumerate(self.entries):
            rng = self._rng(e)
            for _ in range(self.samples):
                drawn = rng.choice(len(self.first) * len(self.last), count, replace=False)
                names = [
                    f"{self.first[i // len(self.last)]} {self.last[i % len(self.last)]}"
                    for i in drawn
                ]
                digits = rng.integers(10, size=(count, 10)).astype(str)
                numbers = ["".join(d) for d in digits]
                lines = [f"{n}: {_dashed(x)}" for n, x in zip(names, numbers, strict=True)]
                one, two, asked = rng.choice(count, 3, replace=False)
                question = f"\n{lines[one]}\n{lines[two]}\n{names[asked]}:"
                yield Question("\n".join(lines), question, numbers[asked], f"E{count}")


def _dashed(digits: str) -> str:
    return f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"


def _places(**texts: tuple[str, set[str]]) -> None:
    for name, (text, needed) in texts.items():
        found = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
        if found != needed:
            places = " and ".join(f"{{{place}}}" for place in sorted(needed))
            raise ConfigError(f"probe.{name}={text!r}: expected {places} in it and nothing else")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"probe.{name}={value}: expected at least {least}")
