"""Monarch Mixer's sequence mixer, causal.

B batch, T time, D model width, L longest document, E embedding width of a position.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from layers.conv import ShortConv
from layers.long_conv import Convolve, ImplicitFilter, LongConvMixer, check_beyond
from layers.projection import Dense, Projection


class MonarchMixer(LongConvMixer):
    """Gated long convolution by Monarch matrices, the sequence mixer of Monarch Mixer (M2).

        x_1, x_2, v = conv_W(W_in x + b_in)
        z = x_2 (h_1 * (v x_1) + bias_1 v x_1) + (h_2 * x + bias_2 x)
        y = W_out z + b_out

    with h * v = M^-1 (M h . M v), M the zero-padded discrete Fourier transform as two
    block-diagonal factors, a Monarch matrix: it costs T^1.5 and runs as matrix products. Zero
    padding makes the map strictly causal; the filters are learned, M is not.

    Source: Fu et al. 2023 (Monarch Mixer), sections 3 and 4, after the sequence mixer of its
    public code, which is bidirectional; filters as in Hyena. The state is all past inputs of the
    long convolutions: it is unbounded.

    Args:
        d_model: D.
        max_len, beyond: L, and what becomes of longer documents; see layers.hyena.
        residual: the second term of z, a long convolution of the layer's own input.
        transform: "monarch", or "fft": the same map, and faster where matrix products are not
            very much faster than memory, as on most CPUs.
        conv_size: W.
        emb_dim: E.
        filter_order: width of the filters' networks.
        num_inner: their inner layers.
        sine_freq: frequency their sines start from.
        projection: makes W_in and W_out.
        backend: form of kernels.causal_conv1d, and of kernels.long_conv where it has it.

    Parameters (public names in brackets): in_proj.weight (3D, D), in_proj.bias (3D,) [in_linear];
    short_filter.weight (3D, W), short_filter.bias (3D,); filter_fn and filter_fn2, of D channels
    each (see layers.long_conv.ImplicitFilter); out_proj.weight (D, D), out_proj.bias (D,)
    [out_linear].

    Raises:
        ValueError: sizes that do not fit, or an unknown transform.
    """

    time_exponent = 1.5

    def __init__(
        self,
        d_model: int,
        *,
        max_len: int = 2048,
        beyond: Literal["refuse", "forget"] = "refuse",
        residual: bool = True,
        transform: Literal["monarch", "fft"] = "monarch",
        conv_size: int = 3,
        emb_dim: int = 5,
        filter_order: int = 128,
        num_inner: int = 2,
        sine_freq: float = 10.0,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if d_model < 1 or conv_size < 1:
            raise ValueError(f"d_model={d_model}, conv_size={conv_size}: expected at least 1")
        if transform not in ("monarch", "fft"):
            raise ValueError(f"transform={transform!r}: allowed: monarch, fft")
        self.d_model, self.max_len, self.backend = d_model, max_len, backend
        check_beyond(beyond)
        self.beyond = beyond
        self.transform, self.num_convs = transform, 1 + residual

        def draw() -> ImplicitFilter:
            return ImplicitFilter(
                d_model,
                max_len,
                emb_dim=emb_dim,
                width=filter_order,
                depth=num_inner,
                frequency=sine_freq,
            )

        self.in_proj = projection(d_model, 3 * d_model, True)
        self.short_filter = ShortConv(3 * d_model, conv_size, bias=True, backend=backend)
        self.filter_fn = draw()
        self.filter_fn2 = draw() if residual else None
        self.out_proj = projection(d_model, d_model, True)

    def filters(self) -> Sequence[ImplicitFilter]:
        """One network for each convolution."""
        return [f for f in (self.filter_fn, self.filter_fn2) if f is not None]

    def mix(self, x: Tensor, u: Tensor, convolve: Convolve) -> Tensor:
        """The gated convolution, and that of the input beside it."""
        before, after, v = u.split(self.d_model, dim=-1)
        y = after * convolve(v * before)
        return y if self.filter_fn2 is None else y + convolve(x.to(y.dtype))
