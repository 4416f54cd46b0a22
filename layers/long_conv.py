"""What mixers with long convolutions share: the filters, the past, and how a call goes.

B batch, T time, P past positions, D model width, R long convolutions, L longest document,
E embedding width of a position.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kernels.long_conv import long_conv, long_conv_flops
from layers.conv import ShortConv
from layers.kv_cache import key_tags, newest
from layers.marks import mark
from layers.mixer import Mixer
from layers.projection import projection_flops
from layers.report import Report
from layers.segments import NO_DOCUMENT, Place, belongs, keep_rows, place

Convolve = Callable[[Tensor], Tensor]


def check_beyond(beyond: str) -> None:
    """Raise ValueError unless `beyond` is a choice."""
    if beyond not in ("refuse", "forget"):
        raise ValueError(f"beyond={beyond!r}: allowed: refuse, forget")


class ImplicitFilter(nn.Module):
    """Long filters as a function of the position, under a window that decays.

        h_t = MLP(z_t) exp(-rate t / (L - 1)),    z_t = [t / (L - 1), cos(f w t), -sin(f w t)]

    with w = 2 pi / L, (E - 1) / 2 frequencies f in equal steps from 1e-4, sin(freq x) after every
    layer of the MLP but the last, and rates in equal steps from ln(100) / 1.5 to ln(100) / 0.3
    over the channels. A filter of fewer positions is the beginning of the one of L.

    Source: Poli et al. 2023 (Hyena), section 3.3 and appendix D.3, after its public standalone
    code.

    Args:
        channels: filters.
        max_len: L.
        emb_dim: E, odd.
        width: of the MLP.
        depth: inner layers of the MLP.
        frequency: that freq starts from.

    Parameters, with their public names: z (L, E), pos_emb.z[0]; layers.0 (width, E), layers.1, ...
    (width, width), and the last (channels, width) without bias, implicit_filter.0, .2, ...; freq
    (width,), implicit_filter.1.freq[0], one for all layers; bias (channels,), the skip of the
    convolutions. None of them decays, and all keep the values given here: torch's own for the MLP,
    normal for the skip.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        channels: int,
        max_len: int,
        *,
        emb_dim: int,
        width: int,
        depth: int,
        frequency: float,
    ) -> None:
        super().__init__()
        if max_len < 2 or width < 1 or depth < 0 or emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(
                f"max_len={max_len}, emb_dim={emb_dim}, filter_order={width}, num_inner={depth}: "
                "expected at least 2, an odd number of at least 3, at least 1 and at least 0"
            )
        self.max_len, self.frequency = max_len, frequency
        self.z = nn.Parameter(torch.empty(max_len, emb_dim))
        self.layers = nn.ModuleList(nn.Linear(n, width) for n in [emb_dim, *[width] * depth])
        self.layers.append(nn.Linear(width, channels, bias=False))
        self.freq = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(channels))
        mark(self, "z", "freq", "bias", decay=False, own_init=True)
        for layer in self.layers:
            names = [name for name, _ in layer.named_parameters()]
            mark(layer, *names, decay=False, own_init=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set what the MLP's layers have not drawn themselves."""
        bands = (self.z.shape[1] - 1) // 2
        t = torch.arange(self.max_len, dtype=torch.float64, device="cpu")[:, None]
        f = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64, device="cpu")
        angle = t * (2 * math.pi / self.max_len) * f
        self.z.copy_(torch.cat([t / (self.max_len - 1), angle.cos(), -angle.sin()], 1))
        self.freq.fill_(self.frequency)
        self.bias.normal_()

    def forward(self, length: int) -> Tensor:
        """The first `length` taps of every filter, (channels, length), in float32 at least."""
        dtype = torch.promote_types(self.z.dtype, torch.float32)
        with torch.autocast(self.z.device.type, enabled=False):
            x = self.z[:length].to(dtype)
            *hidden, last = (m for m in self.layers if isinstance(m, nn.Linear))
            for layer in hidden:
                x = linear(x, layer.weight.to(dtype), layer.bias.to(dtype))
                x = (self.freq.to(dtype) * x).sin()
            h = linear(x, last.weight.to(dtype)).mT
            slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
            rate = torch.linspace(slow, fast, len(h), dtype=dtype, device=h.device)
            t = torch.arange(length, dtype=dtype, device=h.device) / (self.max_len - 1)
            return h * (-rate[:, None] * t).exp()

    def flops(self, length: int) -> int:
        """FLOPs of drawing `length` taps, as FlopCounterMode counts them."""
        return sum(projection_flops(layer, length) for layer in self.layers)


class _Taps:
    """Filters drawn without gradients, kept from one step to the next; no tensor of the state."""

    def __init__(self, taps: list[Tensor]) -> None:
        self.taps = taps

    def reach(self) -> int:
        return self.taps[0].shape[1]


@dataclass(eq=False)
class LongConvState:
    """All that the long convolutions of a layer have read of the document each row ended in.

    The inputs of row b stand in its last `length[b]` positions; zeros are before them.
    """

    inputs: Tensor  # (B, P, R * D) of all long convolutions, newest last
    conv: Tensor  # (B, W-1, channels) inputs of the short convolution, newest last
    length: Tensor  # (B,) int64 positions of the document seen
    segment: Tensor  # (B,) int64 document that the row ended in
    filled: int  # positions in use: P, but 0 for the empty past, whose positions are a wish
    # Not an __init__ field: a state made by dataclasses.replace draws its filters again.
    taps: _Taps | None = field(default=None, init=False, repr=False)


class LongConvMixer(Mixer):
    """A mixer of projections, a short convolution, gates and R long convolutions of width D.

    Its state is all past inputs of the long convolutions: it grows with the document, and a step
    costs as much as the document is long. Steps without gradients keep the filters with the
    state: whoever changes the weights starts from a fresh one.
    """

    bounded_state = False
    state_type = LongConvState
    num_convs: int  # R
    max_len: int  # L
    beyond: Literal["refuse", "forget"]  # what becomes of documents longer than L
    transform: Literal["fft", "monarch"] = "fft"
    backend: str
    in_proj: nn.Module
    out_proj: nn.Module
    short_filter: ShortConv

    @abstractmethod
    def filters(self) -> Sequence[ImplicitFilter]:
        """Where the filters come from; their channels together are R * D, in order."""

    @abstractmethod
    def mix(self, x: Tensor, u: Tensor, convolve: Convolve) -> Tensor:
        """What goes into out_proj, of the input and the short convolution's output `u`.

        `convolve` is the next of the R long convolutions at each call, (B, T, D) -> (B, T, D).
        """

    def forward(
        self,
        x: Tensor,
        state: LongConvState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, LongConvState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract.

        Raises:
            ValueError: also where a document becomes longer than max_len, unless beyond="forget".
        """
        self.check_input(x, state, segments)
        where = place(x, state, segments)
        reach = x.shape[1] + (0 if state is None else state.filled)
        if self.beyond == "refuse":
            self._check_length(reach if segments is None else int(where.positions.max()) + 1)
        kept = self._taps(min(reach, self.max_len), state)
        skips = torch.cat([f.bias for f in self.filters()]).split(self.d_model)
        histories = self._histories(state, where)
        inputs: list[Tensor] = []

        def convolve(v: Tensor) -> Tensor:
            i = len(inputs)
            inputs.append(v)
            return long_conv(
                v,
                kept.taps[i],
                skips[i],
                history=histories[i],
                segments=segments,
                transform=self.transform,
                # Fourier transforms are the vendor's library; Triton is for what is around them.
                backend="torch" if self.backend == "triton" else self.backend,
            )

        u = self.in_proj(x)
        past = None if state is None else keep_rows(where.carry, state.conv).to(u.dtype)
        u, conv = self.short_filter(u, past, segments=segments, want_state=want_state)
        y = self.out_proj(self.mix(x, u, convolve))
        if conv is None:
            return y, None
        after = self._after(torch.cat(inputs, -1), conv, state, where, segments)
        after.taps = None if torch.is_grad_enabled() else kept
        return y, after

    def _check_length(self, reach: int) -> None:
        if reach > self.max_len:
            raise ValueError(
                f"{type(self).__name__}: a document of {reach} positions; its filters have "
                f"max_len={self.max_len}; beyond=forget lets it forget what is further back"
            )

    def _taps(self, needed: int, state: LongConvState | None) -> _Taps:
        """The R filters (D, needed or more): with the state's, steps do not draw them anew."""
        if state is not None and not torch.is_grad_enabled():
            if state.taps is not None and state.taps.reach() >= needed:
                return state.taps
            needed = min(2 * needed, self.max_len)
        drawn = torch.cat([f(needed) for f in self.filters()])
        return _Taps(list(drawn.split(self.d_model)))

    def _histories(self, state: LongConvState | None, where: Place) -> Sequence[Tensor | None]:
        if state is None or state.filled == 0:
            return [None] * self.num_convs
        return keep_rows(where.carry, state.inputs[:, : state.filled]).split(self.d_model, dim=-1)

    def _after(
        self,
        inputs: Tensor,
        conv: Tensor,
        state: LongConvState | None,
        where: Place,
        segments: Tensor | None,
    ) -> LongConvState:
        """The state with inputs (B, T, R * D) appended, of each row's last document alone."""
        tags = segments
        if state is not None:
            if segments is not None:
                tags = key_tags(state, state.filled, where, segments, inputs.shape[1])
            old = state.inputs[:, : state.filled]
            inputs = torch.cat([old, inputs.to(old.dtype)], 1)
        if tags is not None:
            longest = int(where.length.max())
            (inputs,) = newest(belongs(tags, where.last), longest, inputs[:, :, None, :])
            inputs = inputs[:, :, 0]
        return LongConvState(inputs, conv, where.length, where.last, filled=inputs.shape[1])

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LongConvState:
        """No positions; that there will be `max_len` is noted, and takes no memory yet."""
        weight = self.short_filter.weight
        device = weight.device if device is None else device
        dtype = dtype or weight.dtype
        channels, taps = weight.shape
        zero = torch.zeros((), device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return LongConvState(
            zero.expand(batch_size, max_len, self.num_convs * self.d_model),
            torch.zeros(batch_size, taps - 1, channels, device=device, dtype=dtype),
            length,
            torch.full_like(length, NO_DOCUMENT),
            filled=0,
        )

    def state_bytes(self, batch_size: int, length: int) -> int:
        """`length` inputs of R convolutions, W-1 of the short one, two integers per row."""
        channels, taps = self.short_filter.weight.shape
        numbers = length * self.num_convs * self.d_model + (taps - 1) * channels
        return batch_size * (numbers * self.short_filter.weight.dtype.itemsize + 16)

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, both kinds of convolutions and the filters."""
        tokens = batch_size * length
        dense = projection_flops(self.in_proj, tokens) + projection_flops(self.out_proj, tokens)
        taps = min(length, self.max_len)
        drawn = sum(f.flops(taps) for f in self.filters())
        one = long_conv_flops(batch_size, length, self.d_model, taps, transform=self.transform)
        short = self.short_filter.flops(batch_size, length)
        return dense + drawn + short + self.num_convs * one
