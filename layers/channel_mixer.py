"""Channel mixers: what a block does at each position by itself.

D model width, F hidden width.
"""

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from layers.projection import Dense, Projection, projection_flops

MULTIPLE = 8  # hidden widths that follow from `expand` are multiples of this, for tensor cores


class SwiGLU(nn.Module):
    """y = W_down( silu(W_gate x) * W_up x ) (Shazeer 2020, GLU Variants, equation 6, beta = 1).

    Args:
        d_model: D.
        expand: F / D, rounded up to a multiple of 8; 8/3 gives the parameters of a GELU layer
            with expand = 4.
        hidden: F itself; takes the place of `expand`.
        bias: biases in the three projections.
        projection: makes the three projections.

    Parameters: gate_proj.weight, up_proj.weight (F, D), down_proj.weight (D, F).

    Raises:
        ValueError: a width below 1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 8 / 3,
        hidden: int | None = None,
        bias: bool = False,
        projection: Projection = Dense,
    ) -> None:
        super().__init__()
        width = hidden_width(d_model, expand, hidden)
        self.gate_proj = projection(d_model, width, bias)
        self.up_proj = projection(d_model, width, bias)
        self.down_proj = projection(width, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

    def flops(self, tokens: int) -> int:
        """FLOPs over `tokens` positions, as FlopCounterMode counts them."""
        return sum(projection_flops(layer, tokens) for layer in self.children())


class GELU(nn.Module):
    """y = W_down gelu(W_up x + b_up) + b_down, with the exact GELU (Hendrycks and Gimpel 2016).

    Args:
        d_model: D.
        expand: F / D, rounded up to a multiple of 8.
        hidden: F itself; takes the place of `expand`.
        bias: biases in both projections.
        projection: makes both projections.

    Parameters: up_proj.weight (F, D), down_proj.weight (D, F), and their biases.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 4.0,
        hidden: int | None = None,
        bias: bool = True,
        projection: Projection = Dense,
    ) -> None:
        super().__init__()
        width = hidden_width(d_model, expand, hidden)
        self.up_proj = projection(d_model, width, bias)
        self.down_proj = projection(width, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(gelu(self.up_proj(x)))

    def flops(self, tokens: int) -> int:
        """FLOPs over `tokens` positions, as FlopCounterMode counts them."""
        return sum(projection_flops(layer, tokens) for layer in self.children())


def hidden_width(d_model: int, expand: float, hidden: int | None) -> int:
    """The hidden width that `expand` and `hidden` ask for.

    >>> hidden_width(768, 8 / 3, None), hidden_width(100, 4.0, None), hidden_width(100, 4.0, 13)
    (2048, 400, 13)
    """
    if hidden is None:
        # A rounding error of expand * d_model must not add a whole multiple.
        hidden = -int(-(expand * d_model - 1e-6) // MULTIPLE) * MULTIPLE
    if d_model < 1 or hidden < 1:
        raise ValueError(f"d_model={d_model}, expand={expand}, hidden={hidden}: expected >= 1")
    return hidden
