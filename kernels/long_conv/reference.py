"""The convolution as the sum it is. B batch, S inputs, D width, K taps."""

import torch
from torch import Tensor

from kernels.precision import outside_autocast


@outside_autocast
def long_conv_reference(
    u: Tensor, k: Tensor, segments: Tensor | None, past: int, transform: str
) -> Tensor:
    """u (B, S, D), k (D, K), segments (B, S) -> the outputs after the first `past`.

    A document's inputs are those that carry its number, in order: padding takes no lag.
    """
    batch, length, width = u.shape
    if segments is None:
        segments = torch.zeros(batch, length, dtype=torch.int64)
    rows = []
    for b, numbers in enumerate(segments.tolist()):
        outputs, document = [], []  # document: positions of the current one's inputs
        for t, number in enumerate(numbers):
            y = u.new_zeros(width)
            if number >= 0:
                if document and numbers[document[-1]] != number:
                    document = []
                document.append(t)
                for j, s in enumerate(document[::-1][: k.shape[1]]):
                    y = y + k[:, j] * u[b, s]
            outputs.append(y)
        rows.append(torch.stack(outputs[past:]))
    return torch.stack(rows)
