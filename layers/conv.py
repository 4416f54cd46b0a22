"""Short convolutions along time: the depthwise one with its state, and a mixer made of it.

B batch, T time, D model width, E channels of the convolution, W taps.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_flops
from layers.marks import mark
from layers.mixer import Mixer
from layers.projection import Dense, Projection, projection_flops
from layers.report import Report
from layers.segments import NO_DOCUMENT, join, keep_rows


class ShortConv(nn.Module):
    """Depthwise causal convolution over the newest `conv_size` inputs of each channel.

    Parameters: weight (E, W), the last tap on the newest input; bias (E,) where there is one.
    Both start uniform within W^-1/2, as torch's Conv1d does.

    Args:
        channels: E.
        conv_size: W.
        bias: add a learned bias.
        activation: "silu" or None.
        backend: form of kernels.causal_conv1d.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(
        self,
        channels: int,
        conv_size: int,
        *,
        bias: bool = False,
        activation: Literal["silu"] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if channels < 1 or conv_size < 1:
            raise ValueError(f"channels={channels}, conv_size={conv_size}: expected at least 1")
        self.activation = activation
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, conv_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        mark(self, "weight", own_init=True)
        if bias:
            mark(self, "bias", decay=False, own_init=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            parameter.uniform_(-bound, bound)

    def forward(
        self,
        x: Tensor,
        past: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        want_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, E) -> (B, T, E), and the last W-1 inputs (B, W-1, E) if asked for.

        `past` are those of the call before; they belong to each row's first document.
        """
        out = causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            initial_state=past,
            return_state=want_state,
            segments=segments,
            backend=self.backend,
        )
        return out if isinstance(out, tuple) else (out, None)

    def flops(self, batch_size: int, length: int) -> int:
        """FLOPs of a forward pass, as FlopCounterMode counts them."""
        return causal_conv1d_flops(batch_size, length, *self.weight.shape)


@dataclass(frozen=True, eq=False)
class ConvState:
    """What a short convolution still needs of the document each row ended in."""

    inputs: Tensor  # (B, W-1, E) newest last, zeros before the document's start
    segment: Tensor  # (B,) int64 document that the row ended in


class GatedConv(Mixer):
    """Gated short convolution, the local mixer of Based.

        u, g = W_in x + b_in,    y = W_out( silu(conv_W(u)) * g ) + b_out

    Source: Arora et al. 2024 (Based), section 4.3, after the public code's BaseConv. It is not
    the BaseConv of Arora et al. 2023 (Zoology), which has a residual of its own, no expansion and
    no activation. The state is bounded: the last W-1 values of u.

    Args:
        d_model: D.
        conv_size: W, how many inputs an output sees, the newest included.
        expand: E / D, the width of u and of g.
        bias: biases in both projections.
        conv_bias: a bias in the convolution.
        projection: makes both projections.
        backend: form of kernels.causal_conv1d.

    Parameters: in_proj.weight (2E, D), rows of u before rows of g, in_proj.bias (2E,); conv.weight
    (E, W), conv.bias (E,); out_proj.weight (D, E), out_proj.bias (D,).

    Raises:
        ValueError: sizes below 1.
    """

    bounded_state = True
    state_type = ConvState

    def __init__(
        self,
        d_model: int,
        *,
        conv_size: int = 3,
        expand: int = 2,
        bias: bool = True,
        conv_bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if min(d_model, conv_size, expand) < 1:
            raise ValueError(
                f"d_model={d_model}, conv_size={conv_size}, expand={expand}: "
                "each must be at least 1"
            )
        self.d_model = d_model
        self.in_proj = projection(d_model, 2 * expand * d_model, bias)
        self.conv = ShortConv(
            expand * d_model, conv_size, bias=conv_bias, activation="silu", backend=backend
        )
        self.out_proj = projection(expand * d_model, d_model, bias)

    def forward(
        self,
        x: Tensor,
        state: ConvState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, ConvState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        previous = x.new_full(x.shape[:1], NO_DOCUMENT, dtype=torch.int64)
        carry, last = join(previous if state is None else state.segment, segments)
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        past = None if state is None else keep_rows(carry, state.inputs).to(u.dtype)
        mixed, inputs = self.conv(u, past, segments=segments, want_state=want_state)
        y = self.out_proj(mixed * gate)
        return y, None if inputs is None else ConvState(inputs, last)

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ConvState:
        """Zeros, whatever `max_len`."""
        weight = self.conv.weight
        device = weight.device if device is None else device
        channels, taps = weight.shape
        inputs = torch.zeros(
            batch_size, taps - 1, channels, device=device, dtype=dtype or weight.dtype
        )
        return ConvState(inputs, torch.full((batch_size,), NO_DOCUMENT, device=device))

    def state_bytes(self, batch_size: int, length: int) -> int:
        """W-1 inputs and one integer per row, whatever the length."""
        channels, taps = self.conv.weight.shape
        inputs = (taps - 1) * channels * self.conv.weight.dtype.itemsize
        return batch_size * (inputs + 8)

    def flops(self, batch_size: int, length: int) -> int:
        """Both projections and the convolution."""
        tokens = batch_size * length
        dense = projection_flops(self.in_proj, tokens) + projection_flops(self.out_proj, tokens)
        return dense + self.conv.flops(batch_size, length)
