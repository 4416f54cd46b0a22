"""One step of SSD, in as few torch calls as it takes: decoding is call overhead.

B batch, H heads, P width per head, N state, G groups.
"""

from torch import Tensor
from torch.nn.functional import silu

from kernels.precision import accumulation_dtype, outside_autocast


@outside_autocast
def step(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, 1, H, P) and the state (B, H, P, N), of arguments with L = 1."""
    (batch, _, H, P), (G, N) = x.shape, B.shape[2:]
    dtype = accumulation_dtype(x)
    x_t = x[:, 0].to(dtype)
    driven = (x_t * dt[:, 0, :, None]).view(batch, G, -1, 1) * B[:, 0, :, None].to(dtype)
    S = driven.view(batch, H, P, N)
    if initial_states is not None:
        S.addcmul_(log_decay[:, 0, :, None, None].exp(), initial_states.to(dtype))
    y = (driven @ C[:, 0, ..., None].to(dtype)).view(batch, H, P)
    if D is not None:
        y.addcmul_(x_t, D.to(dtype).view(H, -1))
    if z is not None:
        y *= silu(z[:, 0].to(dtype))
    return y.to(x.dtype)[:, None], S
