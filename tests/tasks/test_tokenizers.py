"""Tokenisers: exact round trips, the official count, unknown words, the same ids every time."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from schema.errors import ConfigError
from tasks.text.corpus import count_words
from tasks.text.tokenizers import ByteTokenizer, TokenizerSettings, train_bpe, train_word
from tests.tasks.corpora import OFFICIAL, needs_official

TRAINING = ["the cat sat on the mat\n", "<unk> the <eos> dog\n the  end", "naïve 🐈\r\n" * 3]
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=80)
BPE = train_bpe(TRAINING, 300)
WORD = train_word(TRAINING)


def encode(tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode_batch([text])[0]


@given(ANY_TEXT)
@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "bytes"])
def test_every_text_comes_back_exactly(tokenizer, text):
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.bos]) == text
    assert ((ids >= 0) & (ids < tokenizer.bos)).all()
    assert ids.dtype == np.int64


@pytest.mark.parametrize("text", ["<bos>", "<s>", "<|endoftext|>", "<unk>\x00\x1f\ufeff\u2028\x85"])
@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer(), WORD], ids=["bpe", "bytes", "word"])
def test_no_text_contains_the_begin_of_document_id(tokenizer, text):
    assert tokenizer.bos not in encode(tokenizer, text)
    assert tokenizer.bos == tokenizer.vocab_size - 1


def test_bytes_are_the_bytes():
    assert encode(ByteTokenizer(), "né").tolist() == list("né".encode())
    assert ByteTokenizer().vocab_size == 257
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_bpe_has_the_size_asked_for_or_what_the_text_offers():
    assert BPE.vocab_size < 300
    assert train_bpe(["aaaa bbbb abab\n" * 3], 259).vocab_size == 259
    assert train_bpe([], 300).vocab_size == 257


@given(ANY_TEXT)
def test_word_tokens_are_counted_as_official_words(text):
    assert len(encode(WORD, text)) == count_words(text)


@needs_official
def test_word_tokens_of_wikitext_are_its_official_count():
    text = Path(str(OFFICIAL), "wikitext-2/wiki.test.tokens").read_text(encoding="utf-8")
    tokenizer = train_word([text])
    ids = encode(tokenizer, text)
    assert len(ids) == 245_569
    assert tokenizer.decode(ids).replace("<eos>", "\n").split() == text.split()


def test_words_by_frequency_then_alphabet_and_unknown_ones_are_unk():
    tokenizer = train_word(["b a\nb <unk> c\n", "c c"])
    assert tokenizer.decode(range(5)) == "<unk> <eos> c b a"
    assert tokenizer.vocab_size == 6
    assert tokenizer.unknown == ("<unk>", 0)
    assert tokenizer.decode(encode(tokenizer, "a zebra\n")) == "a <unk> <eos>"


def test_the_same_text_trains_the_same_bpe_in_another_process_and_thread_count():
    script = (
        "from tasks.text.tokenizers import train_bpe\n"
        f"print(train_bpe({TRAINING * 5!r}, 300)._inner.to_str())"
    )
    here = train_bpe(TRAINING * 5, 300)._inner.to_str()
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    there = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert there.stdout.strip() == here


@pytest.mark.parametrize("kind", ["word", "bpe", "bytes", "file"])
def test_saved_and_loaded_gives_the_same_ids(tmp_path, kind):
    file = None
    if kind == "file":
        file = str(tmp_path / "given.json")
        tokenizers.Tokenizer.from_str(BPE._inner.to_str()).save(file)
    settings = TokenizerSettings(kind, 300, file)
    settings.check()
    made = settings.make(TRAINING)
    made.save(tmp_path)
    loaded = settings.load(tmp_path)
    text = "the cat and a naïve dog\n"
    assert loaded.vocab_size == made.vocab_size <= settings.max_vocab
    np.testing.assert_array_equal(encode(loaded, text), encode(made, text))


def test_a_file_is_used_without_its_truncation_padding_and_special_tokens(tmp_path):
    inner = tokenizers.Tokenizer.from_str(BPE._inner.to_str())
    inner.add_special_tokens(["<s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    file = tmp_path / "t.json"
    inner.save(str(file))
    tokenizer = TokenizerSettings("file", 300, str(file)).make([])
    text = "the cat sat on the mat, the mat"
    np.testing.assert_array_equal(encode(tokenizer, text), encode(BPE, text))
    assert tokenizer.bos == inner.token_to_id("<s>") + 1


def test_errors_name_the_key(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ConfigError, match=r"broken\.json: not a tokenizer\.json \("):
        TokenizerSettings("file", 300, str(broken)).make([])
    with pytest.raises(ConfigError, match=r"task\.tokenizer_file=gone\.json: no such file"):
        TokenizerSettings("file", 300, "gone.json").check()
    with pytest.raises(ConfigError, match=r"task\.tokenizer=file with .*=null"):
        TokenizerSettings("file", 300, None)
    with pytest.raises(ConfigError, match=r"task\.tokenizer=bpe with .*=x\.json"):
        TokenizerSettings("bpe", 300, "x.json")
    with pytest.raises(ConfigError, match=r"task\.tokenizer=wrd: allowed: word, bpe, bytes, file"):
        TokenizerSettings("wrd", 300, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"task\.bpe_vocab_size=256: expected more than 256"):
        TokenizerSettings("bpe", 256, None)
