"""The model that every language model has to beat: how often each token occurs."""

import numpy as np

from tasks.text.store import SplitTokens

_BLOCK = 1 << 22  # tokens counted at once


def unigram_nll(train: SplitTokens, scored: SplitTokens, vocab_size: int) -> np.ndarray:
    """Nats of every document of `scored` under add-one smoothed frequencies of `train`.

    p(token) = (count + 1) / (tokens + V), V the ids that a text can hold: the begin-of-document
    id, the last of `vocab_size`, is neither counted nor scored.

    Returns:
        float64 (D,), sums over the tokens of each document.
    """
    bos = vocab_size - 1
    counts = np.ones(bos, np.int64)
    for start in range(0, len(train.tokens), _BLOCK):
        block = np.bincount(train.tokens[start : start + _BLOCK], minlength=vocab_size)
        counts += block[:bos]
    nats = np.append(np.log(counts.sum()) - np.log(counts), 0.0)
    return np.array([nats[document.ids].sum() for document in scored])
