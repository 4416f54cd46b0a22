"""Windows over a row of tokens, by brute force from the documents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tasks.base import IGNORED
from tasks.text.windows import Windows
from tests.tasks.corpora import SMALL, small_task

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
BOS = 256


def split_of(tmp_path_factory, lengths):
    """Documents of so many bytes that name their place in the text."""
    texts, place = [], 0
    for n in lengths:
        texts.append("".join(chr(33 + (place + i) % 90) for i in range(n)))
        place += n
    task = small_task(tmp_path_factory.mktemp("w"), {**SMALL, "train": texts}, seq_len=1)
    task.prepare()
    return task.store["train"], [[BOS, *text.encode()] for text in texts]


def expected(documents, start, length):
    """inputs, labels and segments of the window from place `start` on, token by token."""
    row = [(d, token) for d, ids in enumerate(documents) for token in ids]
    inputs = [token for _, token in row[start : start + length]]
    labels = [IGNORED if t == BOS else t for _, t in row[start + 1 : start + length + 1]]
    first = row[start][0]
    return inputs, labels, [d - first for d, _ in row[start : start + length]]


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12), separate=st.booleans())
def test_training_windows_lie_side_by_side_and_the_incomplete_one_is_left_out(
    tmp_path_factory, lengths, seq_len, separate
):
    split, documents = split_of(tmp_path_factory, lengths)
    windows = Windows(split, seq_len, BOS, separate=separate, drop_last=True)
    assert len(windows) == (len(split.tokens) - 1) // seq_len
    for i in range(len(windows)):
        item = windows[i]
        inputs, labels, segments = expected(documents, i * seq_len, seq_len)
        assert item["inputs"].tolist() == inputs
        assert item["labels"].tolist() == labels
        assert ("segments" in item) == separate
        if separate:
            assert item["segments"].tolist() == segments
            assert item["segments"].dtype == torch.int64
        assert item["inputs"].dtype == item["labels"].dtype == torch.int64
    with pytest.raises(IndexError):
        windows[len(windows)]


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12), separate=st.booleans())
def test_in_validation_every_token_of_every_document_is_a_label_once(
    tmp_path_factory, lengths, seq_len, separate
):
    split, documents = split_of(tmp_path_factory, lengths)
    windows = Windows(split, seq_len, BOS, separate=separate, drop_last=False)
    items = [windows[i] for i in range(len(windows))]
    counted = np.concatenate([item["labels"][item["labels"] != IGNORED] for item in items])
    assert counted.tolist() == [token for ids in documents for token in ids[1:]]
    assert len({item["inputs"].shape for item in items}) == 1
    for item in items:  # a label is what follows its input in the row
        places = (item["labels"][:-1] != IGNORED).nonzero().ravel()
        assert torch.equal(item["labels"][places], item["inputs"][places + 1])


def test_the_last_validation_window_reads_back_instead_of_padding(tmp_path):
    task = small_task(tmp_path, {**SMALL, "validation": ["abcdefg"]}, seq_len=4)
    task.prepare()
    first, last = (task.validation_set()[i] for i in range(2))
    assert first["inputs"].tolist() == [BOS, *b"abc"]
    assert last["inputs"].tolist() == list(b"cdef")
    assert last["labels"].tolist() == [IGNORED, *b"efg"]


def test_batches_stack_and_spawned_workers_read_the_same(tmp_path):
    task = small_task(tmp_path)
    task.prepare()
    windows = task.train_set()

    def batches(workers: int):
        return list(
            DataLoader(
                windows,
                batch_size=2,
                collate_fn=task.collate,
                num_workers=workers,
                multiprocessing_context="spawn" if workers else None,
            )
        )

    here, there = batches(0), batches(1)
    assert here[0]["inputs"].shape == (2, 4)
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys() == {"inputs", "labels", "segments"}
        assert all(torch.equal(one[key], other[key]) for key in one)
