"""WikiText: articles, official counts, files and the datasets library's cache, clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from schema.errors import ConfigError
from tasks.base import SPLITS, Split
from tasks.text.corpus import Chunk, count_words, pieces
from tasks.text.wikitext import WikiText, WikiTextSmall, articles
from tests.tasks.corpora import OFFICIAL, article, needs_official, write_wikitext


def split_articles(text: str) -> list[Chunk]:
    return list(pieces(articles(text.splitlines(keepends=True))))


def text_of(chunks) -> str:
    return "".join(chunk.text for chunk in chunks)


@needs_official
@pytest.mark.parametrize(
    ("split", "file", "words"), [("validation", "valid", 217_646), ("test", "test", 245_569)]
)
def test_official_files_have_60_articles_and_the_official_word_count(split, file, words):
    found = list(pieces(WikiText("wikitext-2", OFFICIAL).read(split)))
    assert len(found) == 60
    assert all(document.title for document in found)
    assert sum(count_words(document.text) for document in found) == words
    path = Path(str(OFFICIAL)) / "wikitext-2" / f"wiki.{file}.tokens"
    assert text_of(found).encode() == path.read_bytes()


@needs_official
def test_small_is_54_and_6_articles_of_the_validation_file_and_the_test_file():
    small = WikiTextSmall(OFFICIAL)
    small.check()
    splits = {split: list(pieces(small.read(split))) for split in ("train", "validation", "test")}
    assert [len(documents) for documents in splits.values()] == [54, 6, 60]
    whole = text_of(pieces(WikiText("wikitext-2", OFFICIAL).read("validation")))
    assert text_of(splits["train"]) + text_of(splits["validation"]) == whole
    assert splits["test"] == list(pieces(WikiText("wikitext-2", OFFICIAL).read("test")))
    assert "first 54 articles" in small.note


def test_an_article_starts_at_the_empty_line_before_its_heading():
    text = article("A", "one") + " \n = = Section = = \n \n two \n" + article("B = C", "three")
    found = split_articles(text)
    assert [a.title for a in found] == ["A", "B = C"]
    assert text_of(found) == text
    assert found[1].text == article("B = C", "three")


@pytest.mark.parametrize(
    "inside",
    [
        " x \n = 1 = \n y \n",  # no empty line on either side
        " x \n = 1 = \n \n",  # none before
        " \n = 1 = \n y \n",  # none after
        " \n = = 1 = = \n \n",  # level two
        " \n = 1 \n \n",  # not closed
        " \n = = \n \n",
    ],
)
def test_lines_that_only_look_like_headings_start_no_article(inside):
    text = article("A", "one") + inside + " end \n"
    assert split_articles(text) == [Chunk(text, "A")]


@pytest.mark.parametrize("text", ["", " \n", " = A = \n", " x \n", " \n = A = \n"])
def test_text_without_a_heading_is_one_article_without_title(text):
    assert split_articles(text) == ([Chunk(text, "")] if text else [])


def test_text_before_the_first_heading_is_kept_and_the_file_may_start_with_a_heading():
    assert [a.title for a in split_articles("preface \n" + article("A", "x"))] == ["", "A"]
    assert split_articles(" = A = \n \n x \n") == [Chunk(" = A = \n \n x \n", "A")]
    two = article("A", "x") + article("B", "y").rstrip("\n")
    assert [a.text for a in split_articles(two)] == [article("A", "x"), article("B", "y")[:-1]]


@pytest.mark.parametrize("variant", ["wikitext-2", "wikitext-103-raw"])
@pytest.mark.parametrize("nested", [True, False])
def test_official_layout_or_the_files_themselves(tmp_path, monkeypatch, variant, nested):
    texts: dict[Split, str] = {s: article("A", s) + "é\r\n" for s in SPLITS}
    write_wikitext(tmp_path, texts, variant)
    corpus = WikiText(variant, str(tmp_path if nested else tmp_path / variant))
    corpus.check()
    assert {split: text_of(corpus.read(split)) for split in texts} == texts
    monkeypatch.setenv("SEQMIX_DATA", str(tmp_path))
    assert text_of(WikiText(variant).read("test")) == texts["test"]


def test_small_refuses_a_validation_file_of_another_number_of_articles(tmp_path):
    write_wikitext(tmp_path, {"validation": article("A", "x"), "test": article("B", "y")})
    with pytest.raises(ConfigError, match=r"wiki\.valid\.tokens has 1 articles; .* has 60"):
        list(WikiTextSmall(str(tmp_path)).read("train"))


def test_missing_files_are_told_quickly_with_all_ways_to_get_them(tmp_path):
    write_wikitext(tmp_path, {"validation": article("A", "x"), "test": article("B", "y")})
    script = (
        "from tasks.text.wikitext import WikiText\n"
        f"try: WikiText('wikitext-2', {str(tmp_path)!r}).check()\n"
        "except ValueError as error: print(error)\n"
    )
    # An empty cache of the library, and an address where nothing answers.
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    said = run(script, env)
    assert said.count("\n") == 1
    for part in (
        "wiki.train.tokens in",
        str(tmp_path / "wikitext-2"),
        "data.root=",
        "SEQMIX_DATA",
        "datasets library (Salesforce/wikitext, wikitext-2-v1)",
        "task=wikitext_small",
    ):
        assert part in said
    assert "wiki.valid" not in said


def test_the_datasets_cache_serves_without_a_network(tmp_path):
    """The library's own files, made by it; the empty lines of the official files are "" there."""
    script = CACHED + (
        "from tasks.text.wikitext import WikiText\n"
        "corpus = WikiText('wikitext-2')\n"
        "corpus.check()\n"
        "for split in rows: print(repr(''.join(chunk.text for chunk in corpus.read(split))))\n"
    )
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    expected = [repr(article(title, "a b")) for title in ("train", "validation", "test")]
    assert run(script, env).splitlines() == expected


CACHED = """
import os
from pathlib import Path
import datasets
from datasets.arrow_writer import ArrowWriter

folder = Path(os.environ["HF_HOME"], "datasets/Salesforce___wikitext/wikitext-2-v1/0.0.0/made")
folder.mkdir(parents=True)
features = datasets.Features({"text": datasets.Value("string")})
splits = datasets.SplitDict(dataset_name="wikitext")
names = ("train", "validation", "test")
rows = {split: ["", f" = {split} = \\n", "", " a b \\n"] for split in names}
for split, lines in rows.items():
    with ArrowWriter(path=str(folder / f"wikitext-{split}.arrow"), features=features) as writer:
        for line in lines:
            writer.write({"text": line})
        examples, size = writer.finalize()
    splits.add(datasets.SplitInfo(split, num_examples=examples, num_bytes=size))
datasets.DatasetInfo(
    features=features, builder_name="parquet", dataset_name="wikitext",
    config_name="wikitext-2-v1", version="0.0.0", splits=splits,
).write_to_directory(str(folder))
"""


def run(script: str, env: dict[str, str]) -> str:
    """What a fresh Python prints: the library reads its settings when it is imported."""
    kept = {k: v for k, v in os.environ.items() if k != "SEQMIX_DATA" and not k.startswith("HF_")}
    root = str(Path(__file__).parents[2])
    made = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, **env, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_unknown_variant_is_one_line():
    with pytest.raises(ConfigError, match=r"task\.corpus\.variant=wikitext-3: allowed: wikitext-2"):
        WikiText("wikitext-3")  # type: ignore[arg-type]
