"""Numerical operators of seqmix: one folder each, no nn.Module, no configuration."""

# `kernels` is also the name of a distribution that other libraries probe for; they read this.
__version__ = "0.1.0"
