"""SEA's mask decoder: a compressed attention matrix, drawn by convolutions causal in time.

B batch, T time, H heads, D head width, K cells, C = 2H channels and P = K/4 columns of the
decoder's pictures.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d

from kernels.causal_conv1d.documents import Documents, last_inputs
from layers.marks import mark
from layers.projection import projection_flops

LAGS = (4, 2, 0)  # of the convolutions' taps in time
HISTORY = LAGS[0]  # rows of the past that a convolution reads
COLUMNS = 4  # cells per column of the decoder's pictures
HALVES = 2  # channels per head


class RowConv(nn.Module):
    """A convolution over pictures whose rows are tokens: 3 x 3, dilation 2, causal in time.

    Row t reads rows t - 4, t - 2 and t of its own document; columns are padded with zeros.

    Parameters: weight (C, C, 3, 3) as (out, in, time, column), oldest row first; bias (C,). A
    weight (C, C, 5, 3), as the public code keeps it with two rows of the future that it masks,
    loads too.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))
        _draw(self.weight, self.bias)
        mark(self, "weight", own_init=True)
        mark(self, "bias", decay=False, own_init=True)
        self.register_load_state_dict_pre_hook(_drop_future_rows)

    def forward(self, x: Tensor, past: Tensor, documents: Documents) -> Tensor:
        """(B, T, C, P) -> (B, T, C, P), the tokens in the order of `documents`.

        Args:
            past: (B, 4, C, P), the rows before the first document's.
        """
        B, T, C, P = x.shape
        rows = torch.cat([past.to(x.dtype), x], 1).flatten(2)
        taps = [
            documents.within(rows[:, HISTORY - lag : HISTORY - lag + T], 0, lag) for lag in LAGS
        ]
        pictures = torch.stack(taps, 2).view(B * T, 3 * C, P)
        weight = self.weight.transpose(1, 2).flatten(1, 2)  # (C, time * C, columns)
        return conv1d(pictures, weight, self.bias, padding=2, dilation=2).view(B, T, C, P)

    def flops(self, tokens: int, columns: int) -> int:
        return 2 * tokens * columns * self.weight.numel()


class Rows(NamedTuple):
    """The last 4 rows that each convolution read, (B, 4, C, P), newest last, zeros in front."""

    first: Tensor
    second: Tensor


class CausalDecoder(nn.Module):
    """The compressed score of every query over K cells of its past, (B, H, T, K).

        rows = LayerNorm_P(W_rows e + b)                         2 channels per head
        picture = relu(conv2(relu(conv1(rows))))                 heads exchange what they know
        score = LayerNorm_K(pool(repeat_4(conv3(picture))))

    conv1 and conv2 are RowConv, so that row t reads rows t - 8 .. t. conv3 is 1 x 1; as the public
    code pads it by a column on each side, its K + 2 columns are pooled to K. Source: Lee et al.
    2024 (SEA), section 3.2, after its public code.

    Differs from the public code in the order of conv3 and the repetition, which commute, and in
    convolutions without the rows of the future that it stores and masks.

    Args:
        num_heads: H.
        head_dim: D.
        num_cells: K, a multiple of 4.

    Parameters: rows.weight (K/2, 2D), of channel 2h before those of channel 2h + 1; row_norm (P,);
    conv1, conv2 as of RowConv with C = 2H; conv3.weight (H, 2H) ((H, 2H, 1, 1) loads too),
    conv3.bias (H,); score_norm (K,).
    """

    def __init__(self, num_heads: int, head_dim: int, num_cells: int) -> None:
        super().__init__()
        self.num_heads, self.num_cells = num_heads, num_cells
        channels, self.columns = HALVES * num_heads, num_cells // COLUMNS
        self.rows = nn.Linear(2 * head_dim, HALVES * self.columns)
        self.row_norm = nn.LayerNorm(self.columns)
        self.conv1 = RowConv(channels)
        self.conv2 = RowConv(channels)
        self.conv3 = nn.Linear(channels, num_heads)
        self.score_norm = nn.LayerNorm(num_cells)
        keep_own_init(self.rows, self.conv3)
        self.conv3.register_load_state_dict_pre_hook(_flatten_1x1)

    def forward(
        self, e: Tensor, past: Rows, segments: Tensor | None, want_rows: bool
    ) -> tuple[Tensor, Rows | None]:
        """The scores of e (B, T, H, 2D), and the rows that the next call reads.

        Args:
            past: rows before the first document of this call.
            segments: int (B, T) document numbers, or None.
        """
        B, T, H, _ = e.shape
        documents = Documents(segments, HISTORY + 1)
        x = self.row_norm(self.rows(e).view(B, T, H * HALVES, self.columns))
        first = documents.arrange(x.flatten(2)).view(x.shape)
        second = self.conv1(first, past.first, documents).relu()
        picture = self.conv2(second, past.second, documents).relu()
        scores = conv1d(
            picture.flatten(0, 1), self.conv3.weight[..., None], self.conv3.bias
        ).repeat_interleave(COLUMNS, dim=-1)
        scores = self.score_norm(pool_columns(scores, self.conv3.bias))
        scores = documents.restore(scores.view(B, T, H * self.num_cells))
        scores = scores.view(B, T, H, self.num_cells).transpose(1, 2)
        if not want_rows:
            return scores, None
        after = [
            last_inputs(documents.restore(x.flatten(2)), p.flatten(2), segments).view(p.shape)
            for x, p in ((first, past.first), (second, past.second))
        ]
        return scores, Rows(*after)

    def no_rows(self, like: Tensor) -> Rows:
        """The rows before the first, zeros; `like` (B, ...) says how many, where and of what."""
        shape = (like.shape[0], HISTORY, len(self.conv1.bias), self.columns)
        return Rows(like.new_zeros(shape), like.new_zeros(shape))

    def flops(self, tokens: int) -> int:
        """FLOPs of a forward pass, as FlopCounterMode counts them."""
        convolutions = sum(conv.flops(tokens, self.columns) for conv in (self.conv1, self.conv2))
        mixing = 2 * tokens * self.columns * self.conv3.weight.numel()
        return projection_flops(self.rows, tokens * self.num_heads) + convolutions + mixing


def pool_columns(x: Tensor, edge: Tensor) -> Tensor:
    """x (N, H, K) with a column of `edge` (H,) on either side, pooled from K + 2 columns to K.

    Adaptive average pooling: means of neighbours, one pair in the middle left out.
    """
    K = x.shape[-1]
    side = edge.to(x.dtype)[:, None].expand(*x.shape[:-1], 1)
    x = torch.cat([side, x, side], -1)
    pairs = (x[..., :-1] + x[..., 1:]) / 2  # (N, H, K + 1)
    return torch.cat([pairs[..., : K // 2], pairs[..., K // 2 + 1 :]], -1)


def keep_own_init(*layers: nn.Linear) -> None:
    """Keep torch's initialisation of weights and biases when a model is built around them."""
    for layer in layers:
        mark(layer, "weight", own_init=True)
        mark(layer, "bias", decay=False, own_init=True)


@torch.no_grad()
def _draw(weight: Tensor, bias: Tensor) -> None:
    """torch's initialisation of a convolution: uniform within fan_in^-1/2."""
    bound = 1 / math.sqrt(weight[0].numel())
    weight.uniform_(-bound, bound)
    bias.uniform_(-bound, bound)


def _drop_future_rows(_: nn.Module, state_dict: Mapping[str, Any], prefix: str, *__: Any) -> None:
    weight = state_dict.get(f"{prefix}weight")
    if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[2] == 5:
        state_dict[f"{prefix}weight"] = weight[:, :, :3]  # type: ignore[index]


def _flatten_1x1(_: nn.Module, state_dict: Mapping[str, Any], prefix: str, *__: Any) -> None:
    weight = state_dict.get(f"{prefix}weight")
    if isinstance(weight, Tensor) and weight.ndim == 4:
        state_dict[f"{prefix}weight"] = weight.flatten(1)  # type: ignore[index]
