"""Hyena: gates between long convolutions.

B batch, T time, D model width, O order, L longest document, E embedding width of a position.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from layers.conv import ShortConv
from layers.long_conv import Convolve, ImplicitFilter, LongConvMixer, check_beyond
from layers.projection import Dense, Projection


class Hyena(LongConvMixer):
    """The Hyena operator of order O.

        x_0, ..., x_{O-1}, v = conv_W(W_in x + b_in)
        v = h_i * (v x_j) + bias_i v x_j  for j = O-1, ..., 1,    y = W_out (v x_0) + b_out

    with filters h of layers.long_conv.ImplicitFilter. Source: Poli et al. 2023 (Hyena),
    definition 3.1 and algorithms 1 to 3, after its public standalone code. The state is all past
    inputs of the long convolutions: it is unbounded.

    Differs from the public code: documents longer than max_len are never cut: see `beyond`.

    Args:
        d_model: D.
        max_len: L. Positions are relative to it, and so is the reach of the windows: near the
            length of the training sequences it gives the paper's filters.
        beyond: "refuse" documents longer than max_len, or "forget" what is max_len positions and
            more behind an output, for which the filters have no taps.
        order: O, at least 2.
        conv_size: W.
        emb_dim: E.
        filter_order: width of the filters' network.
        num_inner: its inner layers.
        sine_freq: frequency its sines start from.
        projection: makes W_in and W_out. The filters' network stays dense.
        backend: form of kernels.causal_conv1d, and of kernels.long_conv where it has it.

    Parameters, named as in the public code: in_proj.weight ((O+1) D, D), in_proj.bias ((O+1) D,);
    short_filter.weight ((O+1) D, W) (there with a dimension of 1 inside), short_filter.bias;
    filter_fn, of (O-1) D channels, D for each convolution in the order of use (see
    ImplicitFilter); out_proj.weight (D, D), out_proj.bias (D,).

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        *,
        max_len: int = 2048,
        beyond: Literal["refuse", "forget"] = "refuse",
        order: int = 2,
        conv_size: int = 3,
        emb_dim: int = 33,
        filter_order: int = 64,
        num_inner: int = 2,
        sine_freq: float = 14.0,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if d_model < 1 or order < 2 or conv_size < 1:
            raise ValueError(
                f"d_model={d_model}, order={order}, conv_size={conv_size}: "
                "expected at least 1, 2 and 1"
            )
        self.d_model, self.max_len, self.backend = d_model, max_len, backend
        check_beyond(beyond)
        self.beyond = beyond
        self.num_convs = order - 1
        width = (order + 1) * d_model
        self.in_proj = projection(d_model, width, True)
        self.short_filter = ShortConv(width, conv_size, bias=True, backend=backend)
        self.filter_fn = ImplicitFilter(
            self.num_convs * d_model,
            max_len,
            emb_dim=emb_dim,
            width=filter_order,
            depth=num_inner,
            frequency=sine_freq,
        )
        self.out_proj = projection(d_model, d_model, True)

    def filters(self) -> Sequence[ImplicitFilter]:
        """One network for all convolutions."""
        return [self.filter_fn]

    def mix(self, x: Tensor, u: Tensor, convolve: Convolve) -> Tensor:
        """The gates and the convolutions between them."""
        first, *gates, v = u.split(self.d_model, dim=-1)
        for gate in reversed(gates):
            v = convolve(v * gate)
        return v * first
