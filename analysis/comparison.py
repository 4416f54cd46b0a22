"""Everything there is to say about a set of runs: what tables, figures and report show."""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.answer import headline, sentences
from analysis.differences import Difference, against, compare_rows
from analysis.load import load
from analysis.rows import Row
from analysis.sections import Section, Settings, make_sections


@dataclass(frozen=True)
class Compared:
    """A section with its differences.

    Attributes:
        headline: the answer.
        sentences: one for each row and the reference.
    """

    section: Section
    differences: tuple[Difference, ...]
    headline: str
    sentences: tuple[str, ...]

    def to_reference(self, row: Row) -> Difference | None:
        """`row` minus the reference; None for the reference and for a row without a result."""
        return against(row, self.section.reference, self.differences)


@dataclass(frozen=True)
class Comparison:
    """What was found under `roots`; `problems` are one line each."""

    roots: tuple[str, ...]
    settings: Settings
    sections: tuple[Compared, ...]
    problems: tuple[str, ...]


def compare(roots: Sequence[str], settings: Settings | None = None) -> Comparison:
    """Compare the runs under `roots`, each a folder or a pattern of folders.

    Raises:
        ConfigError: there is no run, or no metric or row of a name that `settings` has.
    """
    settings = settings or Settings()
    loaded = load(roots)
    sections, problems = make_sections(loaded, settings)
    compared = []
    for section in sections:
        found = compare_rows(section, settings.protocol, settings.interval)
        compared.append(
            Compared(
                section, tuple(found), headline(section, found), tuple(sentences(section, found))
            )
        )
    return Comparison(tuple(roots), settings, tuple(compared), (*loaded.problems, *problems))
