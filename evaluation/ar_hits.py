"""Where a text asks for recall: pairs of tokens that came up before and are rare in training.

After Zoology (Arora et al. 2023, section 3): a token is an AR hit when it and the token before it
form a pair that stands earlier in the context and that training has seldom shown. What is left of
the difference between two models' perplexities is mostly in these few tokens.

V vocabulary. Place i of a document of n + 1 ids stands for reading ids[i] and predicting
ids[i + 1], i = 0..n-1, as in evaluation/protocols.py.
"""

from collections.abc import Sequence

import numpy as np

from tasks.base import Document

_BLOCK = 1 << 22  # training tokens looked at at once


def earlier_places(
    documents: Sequence[Document], train: np.ndarray, vocab_size: int, below: int
) -> list[np.ndarray]:
    """For every place of every document, the last place before it that completed the same pair.

    Args:
        train: ids (T,) of the training text.
        below: a pair that occurs as many times in `train` or more counts as never seen.

    Returns:
        int64 (n,) for each document, -1 where there is none.
    """
    keys = [pair_keys(np.asarray(document.ids), vocab_size) for document in documents]
    earlier = [_last_equal(each) for each in keys]
    wanted = np.unique(np.concatenate([k[e >= 0] for k, e in zip(keys, earlier, strict=True)]))
    frequent = wanted[_count(wanted, train, vocab_size) >= below]
    for each, places in zip(keys, earlier, strict=True):
        places[np.isin(each, frequent)] = -1
    return earlier


def pair_keys(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """One number for each pair of neighbours."""
    return ids[:-1].astype(np.int64) * vocab_size + ids[1:]


def _last_equal(keys: np.ndarray) -> np.ndarray:
    """The last place before each that holds the same key, -1 where there is none."""
    order = np.argsort(keys, kind="stable")
    again = keys[order[1:]] == keys[order[:-1]]
    places = np.full(len(keys), -1)
    places[order[1:][again]] = order[:-1][again]
    return places


def _count(wanted: np.ndarray, train: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each of the keys `wanted`, sorted, occurs in `train`."""
    counts = np.zeros(len(wanted), np.int64)
    if not len(wanted):
        return counts
    for start in range(0, len(train) - 1, _BLOCK):
        keys = pair_keys(np.asarray(train[start : start + _BLOCK + 1]), vocab_size)
        at = np.searchsorted(wanted, keys).clip(max=len(wanted) - 1)
        counts += np.bincount(at[wanted[at] == keys], minlength=len(wanted))
    return counts
