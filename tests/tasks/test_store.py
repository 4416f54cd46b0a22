"""The cache of tokenised text: built once, found by content, verified, rebuilt when damaged."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from schema.errors import ConfigError
from tasks.text.store import MANIFEST, Store
from tasks.text.tokenizers import TokenizerSettings
from tests.tasks.corpora import SMALL, Texts, small_task

BYTES = TokenizerSettings("bytes", 300, None)


def prepared(cache: Path, **options):
    task = small_task(cache, **options)
    task.prepare()
    return task


def stores(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_documents_are_the_texts_behind_a_begin_of_document_id(tmp_path):
    task = prepared(tmp_path)
    for split, texts in SMALL.items():
        documents = task.documents(split)
        assert len(documents) == len(texts)
        for i, (document, text) in enumerate(zip(documents, texts, strict=True)):
            assert document.ids.tolist() == [256, *text.encode()]
            assert document.ids.dtype == np.int64
            assert document.bytes == len(text.encode())
            assert document.words == len(text.split()) + text.count("\n")
            assert document.title == f"{split} {i}"
        assert [d.title for d in documents[-1:]] == [documents[-1].title]
        joined = np.concatenate([document.ids for document in documents])
        np.testing.assert_array_equal(task.store[split].tokens, joined)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "word"])
def test_preparing_again_reads_the_cache(tmp_path, tokenizer):
    first = prepared(tmp_path, tokenizer=tokenizer, bpe_vocab_size=270)
    (folder,) = stores(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = prepared(tmp_path, tokenizer=tokenizer, bpe_vocab_size=270)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert again.facts() == first.facts()
    assert again.vocab_size == first.vocab_size


def test_two_builds_of_the_same_are_the_same(tmp_path):
    one = prepared(tmp_path / "a", tokenizer="bpe", bpe_vocab_size=270)
    two = prepared(tmp_path / "b", tokenizer="bpe", bpe_vocab_size=270)
    for split in SMALL:
        np.testing.assert_array_equal(one.store[split].tokens, two.store[split].tokens)
    assert one.facts() == two.facts()


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "word"},
        {"tokenizer": "bpe", "bpe_vocab_size": 260},
        {"splits": {**SMALL, "test": ["a cat on a log\n", "naïve 🐈 <unk>!\n"]}},
        {"splits": {**SMALL, "test": ["a cat on a log\nnaïve 🐈 <unk>\n"]}},  # one document
    ],
)
def test_other_text_other_documents_or_other_settings_are_another_store(tmp_path, change):
    prepared(tmp_path)
    prepared(tmp_path, **change)
    assert len(stores(tmp_path)) == 2


def test_two_processes_at_once_build_once(tmp_path):
    """Both start before either has built; exactly one says that it tokenises."""
    go = tmp_path / "go"
    script = (
        "import pathlib, time\n"
        "from tests.tasks.corpora import small_task\n"
        f"cache = pathlib.Path({str(tmp_path / 'cache')!r})\n"
        "lines = {s: ['word number %d\\n' % i for i in range(4_000)] for s in"
        " ('train', 'validation', 'test')}\n"
        "task = small_task(cache, lines, tokenizer='bpe')\n"
        "print('ready', flush=True)\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.001)\n"
        "task.prepare()\n"
        "print(task.facts()['splits']['train']['sha256'])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    go.touch()
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum(error.count("tokenising") for _, error in said) == 1
    assert len(stores(tmp_path / "cache")) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def edit_words(path: Path) -> None:
    content = json.loads(path.read_text())
    content["splits"]["test"]["words"] += 1
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("train.tokens", truncate, "train.tokens has"),
        ("test.tokens", flip, "test.tokens is not what was written"),
        ("validation.documents.npz", Path.unlink, "validation.documents.npz is missing"),
        ("tokenizer.json", flip, "tokenizer.json is not what was written"),
        (MANIFEST, Path.unlink, "manifest.json is missing"),
        (MANIFEST, truncate, "manifest.json cannot be read"),
        (MANIFEST, empty, "manifest.json cannot be read"),
        (MANIFEST, edit_words, "manifest.json is not what was written"),
    ],
)
def test_a_damaged_store_is_built_again_saying_so_in_one_line(tmp_path, capsys, name, damage, said):
    options = {"tokenizer": "bpe", "bpe_vocab_size": 270}
    facts = prepared(tmp_path, **options).facts()
    (folder,) = stores(tmp_path)
    damage(folder / name)
    capsys.readouterr()
    task = prepared(tmp_path, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert "building it again" in lines[0]
    assert task.facts() == facts
    capsys.readouterr()
    prepared(tmp_path, **options)
    assert capsys.readouterr().err == ""


def test_a_build_that_was_killed_leaves_nothing_that_counts(tmp_path):
    """SIGKILL while the process tokenises; the next one starts over."""
    script = (
        "import pathlib, time\n"
        "from tests.tasks.corpora import SMALL, Texts, small_task\n"
        "class Slow(Texts):\n"
        "    reads = 0\n"
        "    def read(self, split):\n"
        "        Slow.reads += 1\n"
        "        yield from super().read(split)\n"
        "        if Slow.reads > 4:\n"
        "            print('writing', flush=True)\n"
        "            time.sleep(60)\n"
        f"task = small_task(pathlib.Path({str(tmp_path)!r}))\n"
        "task.corpus = Slow(SMALL)\n"
        "task.prepare()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    (unfinished,) = stores(tmp_path)
    assert unfinished.name.endswith(".building")
    start = time.monotonic()
    task = prepared(tmp_path)
    assert time.monotonic() - start < 30  # the lock died with its holder
    assert stores(tmp_path) == [task.store.folder]


def test_text_that_changes_between_two_readings_is_an_error(tmp_path):
    class Changing(Texts):
        reads = 0

        def read(self, split):
            type(self).reads += 1
            for chunk in super().read(split):
                yield chunk._replace(text=chunk.text + "!" * (self.reads > 3))

    task = small_task(tmp_path)
    task.corpus = Changing(SMALL)
    with pytest.raises(ConfigError, match="texts: the train split changed while it was read"):
        task.prepare()
    assert not any((path / MANIFEST).exists() for path in stores(tmp_path))


def test_an_empty_split_and_a_cache_that_cannot_be_written_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="texts: the test split is empty"):
        prepared(tmp_path, splits={**SMALL, "test": [""]})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache=.*file.*: cannot be written"):
        prepared(tmp_path / "file" / "cache")


def test_ids_take_two_bytes_and_four_beyond_65536(tmp_path):
    words = " ".join(f"w{i}" for i in range(66_000)) + "\n"
    task = prepared(tmp_path, splits={**SMALL, "train": [words]}, tokenizer="word")
    assert task.store["train"].tokens.dtype == np.dtype("<u4")
    assert task.documents("train")[0].ids[0] == task.bos == 66_002
    assert prepared(tmp_path).store["train"].tokens.dtype == np.dtype("<u2")


def test_pickling_a_split_does_not_copy_its_tokens(tmp_path):
    task = prepared(tmp_path, splits={**SMALL, "train": ["word\n" * 100_000]})
    split = task.store["train"]
    assert len(split.tokens) == 500_001
    data = pickle.dumps(split)
    assert len(data) < 10_000
    np.testing.assert_array_equal(pickle.loads(data).tokens, split.tokens)


def test_a_store_opens_without_its_corpus(tmp_path):
    task = prepared(tmp_path)
    store = Store(task.store.folder, BYTES)
    assert store.facts == task.store.facts
    assert Texts(SMALL).name in store.folder.name
