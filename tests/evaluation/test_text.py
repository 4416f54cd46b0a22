"""A text as a whole: the run's own, one that is foreign to its tokeniser, and samples."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from evaluation import Settings, evaluate, print_table
from evaluation.text import read_text, sample
from schema.errors import ConfigError
from tests.tasks.corpora import OFFICIAL, RECIPE, needs_official, small_task
from tests.tiny import tiny_model

QUIET = Settings(samples=0, cost=False)
OTHER = {
    "train": ["never read"],
    "validation": ["nor this"],
    "test": ["the fish sat\n\non the dog\n", "<unk> mat\n"],
}


@pytest.fixture
def task(tmp_path):
    task = small_task(tmp_path, seq_len=8)
    task.prepare()
    return task


def printed(result) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_table(result, console)
    return console.file.getvalue()


def test_figures_of_a_text_are_those_of_a_plain_loop(task):
    model = tiny_model("linear_attention", vocab_size=task.vocab_size).eval().double()
    result = evaluate(model, task, "test", QUIET)
    nll = 0.0
    for document in task.documents("test"):
        ids = torch.from_numpy(document.ids)
        with torch.no_grad():
            logits, _ = model(ids[None, :-1])
        nll += float(torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="sum"))
    text = "a cat on a log\nnaïve 🐈 <unk>\n"
    carried = result["protocols"]["carried"]
    assert carried["nll"] == pytest.approx(nll, rel=1e-9)
    assert carried["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(text.encode()))
    assert carried["word_perplexity"] == pytest.approx(math.exp(nll / 10))  # 8 words, 2 line ends
    assert result["protocols"]["windowed"]["window"] == task.seq_len
    assert result["unigram"]["nll"] == pytest.approx(task.unigram_nll("test").sum())
    sums = [sum(d["nll"][p] for d in result["documents"]) for p in ("windowed", "carried")]
    assert sums == pytest.approx([s["nll"] for s in result["protocols"].values()])
    assert sum(d["tokens"] for d in result["documents"]) == carried["tokens"] == len(text.encode())


def test_a_result_is_plain_and_survives_json(task):
    model = tiny_model("conv", vocab_size=task.vocab_size)
    result = evaluate(model, task, "validation", Settings(max_new_tokens=3))
    assert json.loads(json.dumps(result)) == result
    assert len(result["samples"]) == 2
    assert {"task", "kind", "split", "model", "protocols", "documents", "cost"} <= set(result)
    shown = printed(result)
    assert "texts, validation split" in shown
    assert "prefill, tokens/s" in shown


def test_the_hash_names_the_tokens(task, tmp_path):
    texts = read_text(task, "test", task), read_text(task, "validation", task)
    again = read_text(task, "test", task)
    assert texts[0].facts() == again.facts()
    assert texts[0].facts()["ids_sha256"] != texts[1].facts()["ids_sha256"]


@pytest.mark.parametrize("tokenizer", ["word", "bpe", "bytes"])
def test_another_text_is_read_with_the_runs_own_tokeniser(tmp_path, tokenizer):
    own = small_task(tmp_path, seq_len=8, tokenizer=tokenizer, bpe_vocab_size=270)
    own.prepare()
    other = small_task(tmp_path, OTHER, tokenizer="bytes")  # its own tokeniser is not used
    text = read_text(other, "test", own)
    for document, written in zip(text.documents, OTHER["test"], strict=True):
        assert document.ids[0] == own.bos
        assert np.array_equal(document.ids[1:], own.encode(written))
        assert document.bytes == len(written)
    assert [d.words for d in text.documents] == [3 + 1 + 1 + 3 + 1, 2 + 1]
    # Of 9 + 3 word tokens one is unknown: <unk> itself is in the vocabulary.
    assert text.oov_rate == (pytest.approx(1 / 12) if tokenizer == "word" else 0)
    model = tiny_model("conv", vocab_size=own.vocab_size)
    result = evaluate(model, other, "test", QUIET, trained_on=own)
    assert result["text"]["documents"] == 2
    if tokenizer == "word":
        assert "8.33% of the tokens stand for words outside the vocabulary" in printed(result)


def test_the_same_text_is_the_same_tokens_whoever_reads_it(tmp_path):
    own, twin = small_task(tmp_path, tokenizer="word"), small_task(tmp_path, tokenizer="word")
    own.prepare()
    assert read_text(own, "test", own).facts() == read_text(twin, "test", own).facts()


def test_a_model_of_another_vocabulary_is_refused(task):
    with pytest.raises(ConfigError, match=r"vocabulary of 31 ids, task=texts of 257"):
        evaluate(tiny_model("conv"), task, "test", QUIET)


def test_a_leaky_models_figures_say_so(task, monkeypatch):
    model = tiny_model("conv", vocab_size=task.vocab_size)
    monkeypatch.setattr(type(model), "causal", "leaky")
    monkeypatch.setattr(type(model), "leak_reason", "reads ahead")
    result = evaluate(model, task, "test", QUIET)
    assert result["model"]["causal"] == "leaky"
    shown = printed(result)
    assert "ppl (leaky)" in shown
    assert "LEAKY" in shown
    assert "reads ahead" in shown


def test_samples_continue_the_prompt_and_repeat_with_their_seed(task):
    model = tiny_model("attention", vocab_size=task.vocab_size)
    tokenizer = task.store.tokenizer
    settings = Settings(samples=3, prompt="a cat", max_new_tokens=12, seed=5)
    first = sample(model, tokenizer, settings)
    assert first == sample(model, tokenizer, settings)
    assert len(first) == 3
    assert len(set(first)) > 1
    greedy = Settings(samples=3, prompt="a cat", max_new_tokens=12, temperature=0.0)
    assert len(sample(model, tokenizer, greedy)) == 1
    assert sample(model, tokenizer, Settings(samples=0)) == []


@needs_official
def test_wikitext_has_its_official_word_count(tmp_path):
    from tasks.text.task import LanguageModelling
    from tasks.text.wikitext import WikiText, WikiTextSmall

    own = LanguageModelling(
        WikiTextSmall(OFFICIAL), RECIPE, tokenizer="bytes", seq_len=256, cache=str(tmp_path)
    )
    own.prepare()
    other = LanguageModelling(WikiText("wikitext-2", OFFICIAL), RECIPE)  # no training file needed
    facts = read_text(other, "test", own).facts()
    assert facts == read_text(own, "test", own).facts()
    assert facts["words"] == facts["official_words"] == 245_569


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"eval\.protocol=carried, the longest document: \d+ positions; this model reads 8"),
        ({"protocol": "windowed", "window": 9}, r"eval\.window=9: 9 positions; this model reads 8"),
        (
            {"protocol": "windowed", "samples": 1, "prompt": "a cat", "max_new_tokens": 3},
            r"eval\.prompt and its continuation: 9 positions; this model reads 8 at most",
        ),
    ],
)
def test_more_than_a_model_reads_is_refused_before_any_work(task, options, message):
    model = tiny_model("hyena", vocab_size=task.vocab_size)
    for mixer in model.mixers:
        mixer.max_len, mixer.beyond = 8, "refuse"
    with pytest.raises(ConfigError, match=message):
        evaluate(model, task, "test", Settings(**{"samples": 0, "cost": False, **options}))
