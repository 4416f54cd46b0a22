"""Monarch matrices as a linear layer, from dense weights and back, in one layer or a model.

k = l = nblocks; p inputs and s outputs a block, q = min(p, s) numbers between; zero padded where
nblocks does not divide a width.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kernels.monarch import monarch, monarch_flops, monarch_project
from layers.marks import mark


class MonarchLinear(nn.Module):
    """A linear map whose matrix is a Monarch matrix: a drop-in for a dense projection.

        y = M x + b,    M = P_2 blockdiag(w2) P_1 blockdiag(w1), see kernels.monarch

    Source: Dao et al. 2022 (Monarch), section 3, in the layout of its public code. Its nblocks^2
    interleaved blocks have rank q / nblocks, so that a square layer has 2 / nblocks of a dense
    one's parameters. FLOPs: two per parameter and token.

    Differs from the public code in its default initialisation. Drawing both factors as torch draws
    dense layers ("official") gives M a standard deviation 3^-1/2 of theirs; "matched" draws them
    normal, with variances 1 / p and std^2 p nblocks / q, which gives the entries of M the standard
    deviation `std`. And a bias starts at zero with "matched".

    Args:
        d_in: width of the input.
        d_out: width of the output.
        bias: add a learned bias.
        nblocks: blocks in each factor; 1 is a product of two dense matrices, which saves nothing.
        init: "matched" or "official".
        std: of M's entries with init="matched"; None is that of torch's nn.Linear,
            (3 d_in)^-1/2. The default is what models.initialise gives dense projections.
        backend: form of kernels.monarch.

    Parameters, named as in the public code: blkdiag1 (nblocks, q, p), p = ceil(d_in / nblocks);
    blkdiag2 (nblocks, s, q), s = ceil(d_out / nblocks); bias (d_out,). Both factors decay.

    Raises:
        ValueError: sizes below 1, or so many blocks that some would have rank 0.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool = False,
        *,
        nblocks: int = 4,
        init: Literal["matched", "official"] = "matched",
        std: float | None = 0.02,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if min(d_in, d_out, nblocks) < 1:
            raise ValueError(
                f"d_in={d_in}, d_out={d_out}, nblocks={nblocks}: each must be at least 1"
            )
        p, s = -(-d_in // nblocks), -(-d_out // nblocks)
        q = min(p, s)
        if q < nblocks:
            raise ValueError(
                f"nblocks={nblocks} for {d_in} -> {d_out}: parts of the matrix would have rank 0; "
                f"expected nblocks^2 <= {min(d_in, d_out)}"
            )
        if init not in ("matched", "official"):
            raise ValueError(f"init={init!r}: allowed: matched, official")
        if std is not None and std <= 0:
            raise ValueError(f"std={std}: expected above 0, or None")
        if nblocks == 1:
            warnings.warn("nblocks=1: two dense matrices, no saving", stacklevel=2)
        self.in_features, self.out_features, self.nblocks = d_in, d_out, nblocks
        self.init, self.std, self.backend = init, std, backend
        self.blkdiag1 = nn.Parameter(torch.empty(nblocks, q, p))
        self.blkdiag2 = nn.Parameter(torch.empty(nblocks, s, q))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        mark(self, "blkdiag1", "blkdiag2", own_init=True)
        if bias:
            mark(self, "bias", decay=False, own_init=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters."""
        w1, w2 = self.blkdiag1, self.blkdiag2
        q, p = w1.shape[1:]
        if self.init == "official":
            w1.uniform_(-(p**-0.5), p**-0.5)
            w2.uniform_(-(q**-0.5), q**-0.5)
            if self.bias is not None:
                bound = self.out_features**-0.5
                self.bias.uniform_(-bound, bound)
            return
        std = (3 * self.in_features) ** -0.5 if self.std is None else self.std
        w1.normal_(std=p**-0.5)
        w2.normal_(std=std * (p * self.nblocks / q) ** 0.5)
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        nblocks: int = 4,
        backend: str = "auto",
    ) -> "MonarchLinear":
        """The layer whose matrix is nearest to `weight` (d_out, d_in); `bias` is copied.

        With as much rank as the blocks of `weight` have (nblocks=1 always) it is the same map.
        """
        d_out, d_in = weight.shape
        layer = cls(d_in, d_out, bias is not None, nblocks=nblocks, backend=backend)
        layer.to(weight.device, weight.dtype)
        p, s = layer.blkdiag1.shape[2], layer.blkdiag2.shape[1]
        padded = pad(weight, (0, nblocks * p - d_in, 0, nblocks * s - d_out))
        w1, w2 = monarch_project(padded, nblocks)
        layer.blkdiag1.copy_(w1)
        layer.blkdiag2.copy_(w2)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        p = self.blkdiag1.shape[2]
        if self.nblocks * p != self.in_features:
            x = pad(x, (0, self.nblocks * p - self.in_features))
        y = monarch(x, self.blkdiag1, self.blkdiag2, backend=self.backend)
        y = y[..., : self.out_features]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """M (d_out, d_in), as an nn.Linear would hold it."""
        width = self.nblocks * self.blkdiag1.shape[2]
        eye = torch.eye(width, dtype=self.blkdiag1.dtype, device=self.blkdiag1.device)
        rows = eye[: self.in_features]
        columns = monarch(rows, self.blkdiag1, self.blkdiag2, backend=self.backend)
        return columns[:, : self.out_features].mT

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The same map as an nn.Linear."""
        weight = self.dense_weight()
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        dense.weight.copy_(weight)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense

    def flops(self, tokens: int) -> int:
        """FLOPs of a forward pass over `tokens` positions, as FlopCounterMode counts them."""
        return monarch_flops(tokens, tuple(self.blkdiag1.shape), tuple(self.blkdiag2.shape))

    def extra_repr(self) -> str:
        share = (self.blkdiag1.numel() + self.blkdiag2.numel()) / (
            self.in_features * self.out_features
        )
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"nblocks={self.nblocks}, {share:.1%} of dense"
        )


def to_monarch(
    model: nn.Module, select: Callable[[str], bool] = lambda name: True, *, nblocks: int = 4
) -> list[str]:
    """Replace every nn.Linear whose name `select` takes by its projection ("dense to sparse").

    Layers that share their weight, as a tied head does, are left alone. An optimizer made before
    holds the old parameters: make a new one.

    Returns:
        The names of the layers replaced.
    """
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    chosen = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and uses[id(module.weight)] == 1 and select(name)
    }
    for name, old in chosen.items():
        _replace(model, name, MonarchLinear.from_dense(old.weight, old.bias, nblocks=nblocks))
    return list(chosen)


def densify(model: nn.Module) -> list[str]:
    """Replace every MonarchLinear by the dense layer of the same map ("sparse to dense").

    An optimizer made before holds the old parameters: make a new one.

    Returns:
        The names of the layers replaced.
    """
    chosen = {n: m for n, m in model.named_modules() if isinstance(m, MonarchLinear)}
    for name, old in chosen.items():
        _replace(model, name, old.to_dense())
    return list(chosen)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the layer `name` is, as frozen and in the same mode as that is."""
    parent, _, own = name.rpartition(".")
    old = model.get_submodule(name)
    new.train(old.training).requires_grad_(any(p.requires_grad for p in old.parameters()))
    setattr(model.get_submodule(parent), own, new)
