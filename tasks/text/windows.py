"""Windows over a row of token ids, and which labels count in them.

T length of a window.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks.base import IGNORED
from tasks.text.store import SplitTokens


class Windows(Dataset):
    """Windows of `seq_len` tokens side by side: from place i on, inputs s[i : i + T] and labels
    s[i + 1 : i + T + 1] of the row s of all documents.

    The begin-of-document id is never a label: at a document's last token the label is IGNORED.

    Args:
        split: the documents.
        seq_len: T.
        bos: the begin-of-document id.
        separate: give `segments`, the number of the document within the window, from 0.
        drop_last: leave out the tokens at the end that fill no window. False scores them too: the
            last window then ends where the row ends, and counts only what the one before it did
            not. A row shorter than a window is one window of its own length.

    Items are dicts of int64 tensors (T,): inputs, labels and, if separate, segments.
    """

    def __init__(
        self, split: SplitTokens, seq_len: int, bos: int, *, separate: bool, drop_last: bool
    ) -> None:
        self._split, self._bos, self._separate = split, bos, separate
        places = len(split.tokens) - 1  # that have a next token
        self._length = seq_len if drop_last else min(seq_len, places)
        self._last_start = places - self._length
        self._count = places // seq_len if drop_last else -(-places // seq_len)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        first = index * self._length  # of the places that this window counts
        start = min(first, self._last_start)
        ids = self._split.tokens[start : start + self._length + 1].astype(np.int64)
        inputs, labels = ids[:-1], ids[1:].copy()
        labels[: first - start] = IGNORED
        labels[labels == self._bos] = IGNORED
        item = {"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        if self._separate:
            begun = np.cumsum(inputs == self._bos)
            item["segments"] = torch.from_numpy(begun - begun[0])
        return item
