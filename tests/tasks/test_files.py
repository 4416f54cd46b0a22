"""Local text files: order, fractions, separators, and errors that name what is missing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.errors import ConfigError
from tasks.base import SPLITS
from tasks.text.corpus import pieces
from tasks.text.files import TextFiles, _separated


def write(folder, **files: str) -> list[str]:
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    return [str(folder / f"{name}.txt") for name in files]


def read(corpus: TextFiles) -> dict[str, list[tuple[str, str | None]]]:
    return {split: [(p.text, p.title) for p in pieces(corpus.read(split))] for split in SPLITS}


def test_one_file_is_divided_at_the_first_line_after_each_fraction(tmp_path):
    lines = [f"line {i:02d} é\n" for i in range(20)]  # 11 bytes each
    files = write(tmp_path, a="".join(lines))
    found = read(TextFiles(files, validation=0.25, test=0.1))
    # 0.65 * 220 = 143 bytes lie at the end of line 13, 0.9 * 220 = 198 at the end of line 18.
    assert found == {
        "train": [("".join(lines[:13]), files[0])],
        "validation": [("".join(lines[13:18]), files[0])],
        "test": [("".join(lines[18:]), files[0])],
    }


def test_several_files_are_documents_and_those_that_lie_across_a_fraction_two(tmp_path):
    files = write(tmp_path, b="x\n" * 30, a="y\n" * 10, c="z" * 20)
    found = read(TextFiles(files, validation=0.2, test=0.2))
    assert found["train"] == [("x\n" * 30, files[0])]
    assert found["validation"] == [("y\n" * 10, files[1])]
    assert found["test"] == [("z" * 20, files[2])]
    found = read(TextFiles(files, validation=0.3, test=0.2))
    assert found["train"] == [("x\n" * 25, files[0])]
    assert found["validation"] == [("x\n" * 5, files[0]), ("y\n" * 10, files[1])]


@given(
    st.lists(st.text(st.sampled_from("ab\né"), max_size=40), min_size=1, max_size=5),
    st.sampled_from([0.01, 0.3, 0.49]),
    st.sampled_from([0.01, 0.3, 0.5]),
    st.sampled_from([None, "\n", "ab"]),
)
def test_the_splits_together_are_the_files(tmp_path_factory, texts, validation, test, separator):
    files = write(tmp_path_factory.mktemp("f"), **{f"f{i}": t for i, t in enumerate(texts)})
    found = read(TextFiles(files, validation, test, separator))
    together = "".join(text for split in SPLITS for text, _ in found[split])
    assert together == "".join(texts)


def test_a_separator_ends_a_document_and_stays_in_it(tmp_path):
    files = write(tmp_path, a="one<|end|>two<|end|>", b="three")
    found = read(TextFiles(files, 0.01, 0.01, separator="<|end|>"))
    documents = [document for split in SPLITS for document in found[split]]
    assert documents == [
        ("one<|end|>", f"{files[0]}#1"),
        ("two<|end|>", f"{files[0]}#2"),
        ("three", f"{files[1]}#1"),
    ]


@given(st.text(st.sampled_from("ab-"), max_size=30), st.integers(1, 7), st.text("-a", min_size=1))
def test_documents_do_not_depend_on_the_size_of_blocks(text, size, separator):
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    found = [p.text for p in pieces(_separated(blocks, separator, "f"))]
    *complete, last = text.split(separator)
    assert found == [part + separator for part in complete] + ([last] if last else [])


def test_patterns_stand_for_their_matches_in_order(tmp_path, monkeypatch):
    write(tmp_path, b="b\n" * 10, a="a\n" * 10, c="c\n" * 10)
    monkeypatch.chdir(tmp_path)
    corpus = TextFiles(["c.txt", "[ab].txt"])
    corpus.check()
    assert "".join(chunk.text for chunk in corpus.read("train")).startswith("c\n" * 10 + "a\n")


def test_errors_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"files: no file .*gone\.txt"):
        TextFiles([*write(tmp_path, a="a"), str(tmp_path / "gone.txt")]).check()
    with pytest.raises(ConfigError, match=r"files: no file .*gone-\*"):
        TextFiles([str(tmp_path / "gone-*")]).check()
    with pytest.raises(ConfigError, match=r"files=\[\]: expected a list of text files"):
        TextFiles([])
    with pytest.raises(ConfigError, match=r"files=a\.txt: expected a list"):
        TextFiles("a.txt")
    with pytest.raises(
        ConfigError, match=r"task\.corpus\.validation=0\.6, task\.corpus\.test=0\.4"
    ):
        TextFiles(["a"], 0.6, 0.4)
    with pytest.raises(ConfigError, match=r"task\.corpus\.separator=''"):
        TextFiles(["a"], separator="")
