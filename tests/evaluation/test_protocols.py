"""Both protocols against a token-by-token evaluation in plain torch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from evaluation.protocols import score_carried, score_windowed, windows
from tasks.base import Document
from tests.tiny import CAUSAL, tiny_model

HYBRID = ["conv", "attention", "linear_attention"]
V = 31
EXACT = 1e-9  # relative, models in fp64: the two sides run forwards of different shapes


def documents(lengths, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(rng.integers(0, V, n + 1), words=n, bytes=4 * n, title=f"document {i}")
        for i, n in enumerate(lengths)
    ]


def token_by_token(model, ids: np.ndarray, window: int, stride: int) -> float:
    """NLL of one document: for every token, the context that the protocol's definition gives it.

    Token i (from 1) is first reached by the window that starts at the smallest multiple k of the
    stride with k + window >= i.
    """
    total = 0.0
    for i in range(1, len(ids)):
        begin = max(0, math.ceil((i - window) / stride)) * stride
        logits, _ = model(torch.as_tensor(ids[begin:i])[None])
        total -= float(logits[0, -1].double().log_softmax(-1)[int(ids[i])])
    return total


@given(
    length=st.integers(1, 60),
    window=st.integers(1, 70),
    data=st.data(),
)
def test_windows_count_every_place_once_with_the_promised_context(length, window, data):
    prefix = data.draw(st.integers(0, min(length, window) - 1))
    stride = data.draw(st.integers(1, window - prefix))
    counted = []
    for span in windows(0, length, window, stride, prefix):
        assert 0 <= span.begin <= span.counted < span.end <= length
        assert span.counted >= span.begin + prefix
        assert span.length <= window
        for place in range(span.counted, span.end):
            assert place - span.begin >= min(place, window - stride)
        counted += range(span.counted, span.end)
    assert counted == list(range(prefix, length))


def test_behind_a_prefix_only_what_was_not_seen_is_scored():
    """Each token by a pass over its window, the window's own prefix read in both directions."""
    window, stride, prefix = 11, 4, 5
    docs = documents([3, 5, 6, 17, 40])
    model = tiny_model(["conv", "jrt"], vocab_size=V).double().eval()
    score = score_windowed(model, docs, window=window, stride=stride, prefix=prefix, batch_size=3)
    for document, got in zip(docs, score.documents, strict=True):
        expected = 0.0
        for i in range(prefix + 1, len(document.ids)):
            begin = max(0, math.ceil((i - window) / stride)) * stride
            read = torch.as_tensor(document.ids[begin:i])[None]
            logits, _ = model(read, prefix_len=torch.tensor([prefix]))
            expected -= logits[0, -1].log_softmax(-1)[int(document.ids[i])].item()
        assert got.tokens == max(0, len(document.ids) - 1 - prefix)
        assert got.nll == pytest.approx(expected, rel=EXACT)
    assert score.context == "7-11 tokens, behind a prefix of 5"
    assert score.summary()["word_perplexity"] is None
    causal = score_windowed(model, docs, window=window, stride=stride)
    assert causal.nll != pytest.approx(score.nll, rel=1e-3)  # the prefix was read


@pytest.mark.parametrize("pattern", [*CAUSAL, HYBRID], ids=str)
@torch.no_grad()
def test_windowed_is_the_token_by_token_sum(pattern):
    model = tiny_model(pattern).eval().double()
    texts = documents([1, 9, 23, 8, 17])
    for window, stride, batch_size in ((8, 3, 2), (5, 5, 4), (7, 1, 16)):
        score = score_windowed(model, texts, window=window, stride=stride, batch_size=batch_size)
        for text, got in zip(texts, score.documents, strict=True):
            expected = token_by_token(model, text.ids, window, stride)
            assert got.nll == pytest.approx(expected, rel=EXACT)
            assert (got.title, got.words, got.tokens) == (text.title, text.words, text.words)


@pytest.mark.parametrize("pattern", [*CAUSAL, HYBRID], ids=str)
@torch.no_grad()
def test_carried_is_the_token_by_token_sum(pattern):
    model = tiny_model(pattern).eval().double()
    texts = documents([1, 9, 23, 8, 17])
    expected = [token_by_token(model, text.ids, 99, 99) for text in texts]
    for chunk, batch_size in ((1, 5), (4, 2), (7, 3), (64, 16)):
        score = score_carried(model, texts, chunk=chunk, batch_size=batch_size)
        assert [d.nll for d in score.documents] == pytest.approx(expected, rel=EXACT)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    window=st.integers(1, 32),
    batch_size=st.integers(1, 5),
    data=st.data(),
)
def test_any_window_and_stride_on_any_documents(lengths, window, batch_size, data):
    stride = data.draw(st.integers(1, window))
    model = tiny_model("conv", num_layers=1).eval().double()
    texts = documents(lengths, seed=len(lengths))
    score = score_windowed(model, texts, window=window, stride=stride, batch_size=batch_size)
    with torch.no_grad():
        expected = [token_by_token(model, text.ids, window, stride) for text in texts]
    assert [d.nll for d in score.documents] == pytest.approx(expected, rel=EXACT)
    assert score.tokens == sum(lengths)


@pytest.mark.parametrize("pattern", [*CAUSAL, HYBRID], ids=str)
def test_protocols_agree_where_a_window_covers_the_document(pattern):
    source = Path(tasks.__file__).with_name("base.py").read_text()
    ids = np.frombuffer(source.encode(), dtype=np.uint8).astype(np.int64)
    cuts = np.array_split(ids[:3001], [1900, 2500])
    texts = [Document(cut, len(cut), len(cut), "") for cut in cuts]
    model = tiny_model(pattern, vocab_size=256)
    whole = score_windowed(model, texts, window=None)
    large = score_windowed(model, texts, window=1900, stride=1900)
    carried = score_carried(model, texts, chunk=257, batch_size=2)
    assert whole.nll == pytest.approx(large.nll, rel=1e-6)
    if model.causal == "leaky":
        return  # what it sees of the future depends on where a call ends
    # fp32 sums in another order differ by about 1e-6; the protocols are held to 1e-4
    assert carried.nll == pytest.approx(whole.nll, rel=1e-5)


def test_sums_do_not_depend_on_dropout_batch_or_progress():
    model = tiny_model("conv").train()
    texts = documents([9, 23, 8])
    told = []
    one = score_windowed(model, texts, window=6, stride=4, batch_size=1, progress=told.append)
    all_ = score_windowed(model, texts, window=6, stride=4, batch_size=99)
    assert one.nll == pytest.approx(all_.nll, rel=1e-6)
    assert sum(told) == one.tokens == 40
    assert model.training


def test_a_leaky_model_never_sees_padding(monkeypatch):
    model = tiny_model("conv")
    monkeypatch.setattr(type(model), "causal", "leaky")
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, *a, **k: seen.append(x) or hidden(x, *a, **k))
    texts = [Document(np.arange(1, n + 2), n, n, "") for n in (3, 9, 3, 20)]
    score_windowed(model, texts, window=8, stride=8)
    score_carried(model, texts, chunk=6)
    assert len(seen) > 8
    assert all((x > 0).all() for x in seen)  # padding would be id 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0; expected at least 1"),
        ({"window": 4, "stride": 5}, "stride=5; allowed: up to 4, window less prefix"),
        ({"window": 4, "prefix": 2, "stride": 3}, "stride=3; allowed: up to 2, window less"),
        ({"window": 4, "prefix": 4}, "prefix=4; allowed: 0 to 3, less than the window"),
        ({"window": 9, "prefix": 5}, "prefix=5: no document is longer"),
        ({"window": 4, "stride": 0}, "stride=0; expected at least 1"),
        ({"window": None, "stride": 4}, "stride=4 without a window"),
        ({"window": 4, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        score_windowed(tiny_model("conv"), documents([5]), **options)


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="none given"):
        score_carried(tiny_model("conv"), [])
    with pytest.raises(ValueError, match="'document 1': no token after"):
        score_carried(tiny_model("conv"), documents([3, 0]))
    with pytest.raises(ValueError, match="chunk=0"):
        score_carried(tiny_model("conv"), documents([3]), chunk=0)
