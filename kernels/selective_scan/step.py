"""One step of the selective scan, in as few torch calls as it takes: decoding is call overhead.

B batch, D channels, N state, G groups.
"""

from torch import Tensor
from torch.nn.functional import silu, softplus

from kernels.precision import accumulation_dtype, outside_autocast


@outside_autocast
def step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, D, 1) and the state (B, D, N), of arguments with L = 1 and B, C (B, G, N, 1)."""
    batch, groups, N, _ = B.shape
    dtype = accumulation_dtype(u)
    u_t, size = u[..., 0].to(dtype), delta[..., 0].to(dtype)
    if delta_bias is not None:
        size = size + delta_bias.to(dtype)
    if delta_softplus:
        size = softplus(size)
    if segments is not None:
        size = size.masked_fill(segments < 0, 0)
    driven = (size * u_t).view(batch, groups, -1, 1) * B.to(dtype).mT
    h = driven.view(batch, -1, N)
    if initial_state is not None:
        h.addcmul_((size[..., None] * A.to(dtype)).exp_(), initial_state.to(dtype))
    y = (driven @ C.to(dtype)).view(batch, -1)
    if D is not None:
        y.addcmul_(u_t, D.to(dtype))
    if z is not None:
        y *= silu(z[..., 0].to(dtype))
    return y.to(u.dtype)[..., None], h
