"""Numerical operators of seqmix: one folder each, no nn.Module, no configuration."""

from kernels.attention import attention
from kernels.causal_conv1d import causal_conv1d
from kernels.dispatch import BackendError
from kernels.estimated_sparse_attention import estimated_sparse_attention
from kernels.linear_attention import linear_attention
from kernels.linear_cross_entropy import linear_cross_entropy, linear_nll
from kernels.linear_recurrence import linear_recurrence
from kernels.long_conv import long_conv
from kernels.monarch import monarch, monarch_project
from kernels.rms_norm import rms_norm
from kernels.routing_attention import routing_attention
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd

__all__ = [
    "BackendError",
    "attention",
    "causal_conv1d",
    "estimated_sparse_attention",
    "linear_attention",
    "linear_cross_entropy",
    "linear_nll",
    "linear_recurrence",
    "long_conv",
    "monarch",
    "monarch_project",
    "rms_norm",
    "routing_attention",
    "selective_scan",
    "ssd",
]

# `kernels` is also the name of a distribution that other libraries probe for; they read this.
__version__ = "0.1.0"
