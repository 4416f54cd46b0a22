"""The standard library's text: the same on every reading, divided by name, capped."""

import pytest

from schema.errors import ConfigError
from tasks.base import SPLITS
from tasks.text.corpus import pieces
from tasks.text.stdlib import Stdlib


def documents(corpus: Stdlib) -> dict[str, dict[str, str]]:
    return {split: {c.title or "": c.text for c in corpus.read(split)} for split in SPLITS}


@pytest.fixture(scope="module")
def small() -> dict[str, dict[str, str]]:
    return documents(Stdlib(max_mb=1))


def test_reading_again_gives_the_same_in_the_same_order(small):
    again = documents(Stdlib(max_mb=1))
    assert [list(split.items()) for split in again.values()] == [
        list(split.items()) for split in small.values()
    ]


def test_documents_are_modules_and_help_topics_of_one_split_each(small):
    names = [name for split in small.values() for name in split]
    assert len(names) == len(set(names))
    assert all(name.endswith(".py") or name.startswith("help/") for name in names)
    assert all(list(pieces(Stdlib(max_mb=1).read(split))) for split in SPLITS)


def test_the_cap_holds_and_raising_it_moves_no_document(small):
    size = sum(len(text.encode()) for split in small.values() for text in split.values())
    assert 0.5e6 < size <= 1e6
    larger = documents(Stdlib(max_mb=3))
    for split in SPLITS:
        assert small[split].keys() < larger[split].keys()


def test_tests_and_installed_packages_are_left_out(small):
    parts = {part for split in small.values() for name in split for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test"}


def test_the_cap_is_positive():
    Stdlib().check()
    with pytest.raises(ConfigError, match=r"task\.corpus\.max_mb=0: expected more than 0"):
        Stdlib(0)
