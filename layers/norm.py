"""Normalisation over the features of a position."""

import torch
from torch import Tensor, nn

from kernels import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, eq. 4).

    Args:
        d_model: width D of the last dimension.
        eps: added to the mean square.
        backend: form of kernels.rms_norm.

    Raises:
        ValueError: a width below 1 or a negative eps.
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, backend: str = "auto") -> None:
        super().__init__()
        if d_model < 1 or eps < 0:
            raise ValueError(f"d_model={d_model}, eps={eps}: expected d_model >= 1 and eps >= 0")
        self.eps = eps
        self.backend = backend
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, self.weight, eps=self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
