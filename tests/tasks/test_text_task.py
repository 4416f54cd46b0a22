"""Language modelling as a task: facts, notes, the unigram baseline, errors in one line."""

import json
import os

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from schema.errors import ConfigError
from tasks.base import SPLITS
from tasks.text.task import LanguageModelling
from tasks.text.wikitext import WikiTextSmall
from tests.tasks.corpora import (
    OFFICIAL,
    RECIPE,
    SMALL,
    Texts,
    needs_official,
    small_task,
)


def prepared(cache, **options) -> LanguageModelling:
    task = small_task(cache, **options)
    task.check()
    task.prepare()
    return task


@needs_official
@pytest.mark.parametrize("tokenizer", ["bpe", "word"])
def test_wikitext_small_counts_the_official_words(tmp_path, tokenizer):
    corpus = WikiTextSmall(OFFICIAL)
    task = LanguageModelling(corpus, RECIPE, tokenizer=tokenizer, cache=str(tmp_path))
    task.prepare()
    facts = task.facts()
    test = facts["splits"]["test"]
    assert test["words"] == test["official_words"] == 245_569
    assert facts["splits"]["train"]["words"] + facts["splits"]["validation"]["words"] == 217_646
    assert [facts["splits"][split]["documents"] for split in SPLITS] == [54, 6, 60]
    assert "54 articles" in task.note
    assert facts["note"] == task.note
    documents = task.documents("test")
    assert sum(document.words for document in documents) == 245_569
    nll = task.unigram_nll("test").sum()
    perplexity = np.exp(nll / test["words"])
    if tokenizer == "word":
        assert test["tokens"] == test["words"]
        assert test["oov_rate"] == pytest.approx(13_307 / 245_569)
        assert 400 < perplexity < 700  # it ignores all context
    else:
        text = "".join(task.decode(document.ids) for document in documents)
        with open(os.path.join(str(OFFICIAL), "wikitext-2/wiki.test.tokens"), newline="") as file:
            assert text == file.read()
        assert test["oov_tokens"] == 0


def test_the_validation_labels_are_the_tokens_of_its_documents(tmp_path):
    task = prepared(tmp_path)
    windows = task.validation_set()
    counted = sum(int((windows[i]["labels"] >= 0).sum()) for i in range(len(windows)))
    assert counted == task.facts()["splits"]["validation"]["tokens"]


def test_concatenated_documents_have_no_segments_and_bos_is_still_no_label(tmp_path):
    task = prepared(tmp_path, documents="concatenated")
    items = [task.train_set()[i] for i in range(len(task.train_set()))]
    assert all("segments" not in item for item in items)
    assert all((item["labels"] != task.bos).all() for item in items)
    assert task.facts()["documents"] == "concatenated"


def test_words_outside_the_vocabulary_are_counted_and_told(tmp_path):
    task = prepared(tmp_path, tokenizer="word")
    facts = task.facts()
    test = facts["splits"]["test"]
    # Of a cat on a log <eos> naïve 🐈 <unk> <eos> the vocabulary lacks three; <unk> stands in it.
    assert test["tokens"] == test["words"] == 10
    assert test["oov_tokens"] == 3
    assert test["oov_rate"] == 0.3
    assert facts["splits"]["train"]["oov_tokens"] == 0
    (note,) = facts["notes"]
    assert note.startswith("test: 30.00% of the tokens are outside the vocabulary")


def test_a_file_that_does_not_give_the_text_back_is_told(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "t.json"))
    splits = {"train": ["the cat the cat"], "validation": ["the cat"], "test": ["The cat"]}
    task = prepared(
        tmp_path,
        splits=splits,
        tokenizer="file",
        tokenizer_file=str(tmp_path / "t.json"),
        seq_len=2,
    )
    facts = task.facts()
    assert facts["splits"]["validation"]["unfaithful_pieces"] == 0
    assert facts["splits"]["test"]["unfaithful_pieces"] == 1
    assert facts["splits"]["train"]["unfaithful_pieces"] is None
    assert [note for note in facts["notes"] if "does not give back the text of 1 pieces" in note]
    assert task.vocab_size == 4


def test_unigram_is_the_add_one_smoothed_frequency_of_the_training_tokens(tmp_path):
    task = prepared(tmp_path)
    training = b"".join(text.encode() for text in SMALL["train"])
    expected = [
        sum(-np.log((training.count(bytes([b])) + 1) / (len(training) + 256)) for b in t.encode())
        for t in SMALL["test"]
    ]
    np.testing.assert_allclose(task.unigram_nll("test"), expected, rtol=1e-12)  # sums in fp64


def test_encode_and_decode(tmp_path):
    task = prepared(tmp_path, tokenizer="bpe", bpe_vocab_size=270)
    ids = task.encode("the naïve log\n")
    assert task.decode([task.bos, *ids]) == "the naïve log\n"
    assert task.bos not in ids


def test_facts_are_plain_and_name_the_text_and_the_tokeniser(tmp_path):
    facts = prepared(tmp_path, tokenizer="bpe", bpe_vocab_size=270).facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["tokenizer"]["kind"] == "bpe"
    assert facts["tokenizer"]["vocab_size"] == 270
    assert len(facts["tokenizer"]["sha256"]) == 64
    assert all(len(facts["splits"][split]["sha256"]) == 64 for split in SPLITS)


def test_building_reads_nothing_and_writes_nothing(tmp_path):
    class Unreadable(Texts):
        def check(self):
            raise AssertionError

        def read(self, split):
            raise AssertionError

    task = LanguageModelling(Unreadable(SMALL), RECIPE, cache=str(tmp_path / "cache"))
    assert task.max_vocab == 8192
    assert not (tmp_path / "cache").exists()
    with pytest.raises(RuntimeError, match=r"prepare\(\) has to come first"):
        _ = task.vocab_size


def test_the_default_cache_is_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = LanguageModelling(Texts(SMALL), RECIPE, tokenizer="bytes", seq_len=4)
    task.prepare()
    assert (tmp_path / ".seqmix_cache").is_dir()


def test_errors_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.seq_len=0: expected at least 1"):
        small_task(tmp_path, seq_len=0)
    with pytest.raises(ConfigError, match=r"task\.documents=apart: allowed: separate, concat"):
        small_task(tmp_path, documents="apart")
    with pytest.raises(ConfigError, match=r"task\.seq_len=60: the training split of texts has 55 "):
        prepared(tmp_path, seq_len=60)
    with pytest.raises(ConfigError, match=r"task\.tokenizer_file=gone\.json: no such file"):
        small_task(tmp_path, tokenizer="file", tokenizer_file="gone.json").prepare()
