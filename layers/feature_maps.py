"""Feature maps phi of linear attention: weights phi(q).phi(k) in place of exp(q.k).

B batch, T time, H heads, K key width per head, F features per head. Every map computes in float32
(float64 for float64 inputs) whatever the autocast, and returns that dtype.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kernels.linear_attention import SMALLEST_FEATURE, MapName, features, num_features
from layers.marks import mark

Activation = Literal["softmax", "exp", "exp_stable", "joint"]
MapInit = Literal["identity", "kaiming_per_head", "zero_with_skip"]
RandomKernel = Literal["relu", "exp"]


class FeatureMap(nn.Module):
    """(B, T, H, K) -> (B, T, H, F); `num_features` is F.

    Where `operator_map` is set, the map is kernels.linear_attention.features of `inputs` under
    that name, which the operator can make for itself.
    """

    num_features: int
    operator_map: MapName | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """What of the map has parameters or scales, (B, T, H, X)."""
        raise NotImplementedError

    def flops(self, tokens: int) -> int:
        """FLOPs over `tokens` positions of all heads, as FlopCounterMode counts them."""
        return 0


class EluFeatureMap(FeatureMap):
    """1 + elu(x): x + 1 above zero, exp(x) below (Katharopoulos et al. 2020, equation 7)."""

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.num_features = key_dim

    def forward(self, x: Tensor) -> Tensor:
        x = _widen(x)
        # Not elu(x) + 1, which cancels to zero below -17 in float32.
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


class ReluFeatureMap(FeatureMap):
    """max(x, 0); all features of a key can be zero, so that a weight can be exactly zero."""

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.num_features = key_dim

    def forward(self, x: Tensor) -> Tensor:
        return _widen(x).relu()


class TaylorFeatureMap(FeatureMap):
    """Second-order Taylor polynomial of exp: phi(x).phi(y) = 1 + s + s^2/2 with s = x.y/sqrt(K).

    Source: Arora et al. 2024 (Based), section 4.1; Zhang et al. 2024 (Hedgehog), section 4.1. In
    order, phi(x) is 1, x / K^(1/4), and the outer product x x^T row by row / sqrt(2 K): F =
    1 + K + K^2. The weights are at least 1/2, so that no normaliser comes near zero.

    Args:
        key_dim: K.
        scale_dim: takes the place of K in the scales; K by default.
        compressed: the same kernel with each product x_a x_b kept once (a >= b, row by row; off
            the diagonal times sqrt(2)): F = 1 + K + K (K + 1) / 2.

    Raises:
        ValueError: `key_dim` or `scale_dim` below 1.
    """

    def __init__(
        self, key_dim: int, *, scale_dim: int | None = None, compressed: bool = False
    ) -> None:
        super().__init__()
        if key_dim < 1 or (scale_dim is not None and scale_dim < 1):
            raise ValueError(f"key_dim={key_dim}, scale_dim={scale_dim}: expected at least 1")
        self.scale_dim = key_dim if scale_dim is None else scale_dim
        self.operator_map: MapName = "taylor_compressed" if compressed else "taylor"
        self.num_features = num_features(key_dim, self.operator_map)

    def inputs(self, x: Tensor) -> Tensor:
        """x / K^(1/4)."""
        return _widen(x) * self.scale_dim**-0.25

    def forward(self, x: Tensor) -> Tensor:
        return features(self.inputs(x), self.operator_map)


class PerformerFeatureMap(FeatureMap):
    """Random features of a kernel, the same for all heads (Choromanski et al. 2021, Performers).

    With x' = x / K^(1/4) and a random W (M, K),

        relu    phi(x) = max(W x', 0) + 1e-3
        exp     phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(M), FAVOR+: the mean of phi(x).phi(y) over W
                is exp(x.y / sqrt(K))

    each a function of its own position alone. The rows of W are orthogonal within blocks of K and
    as long as Gaussian vectors (section 3.2 there); they are drawn once and saved.

    Differs from the public code in "exp": it subtracts a maximum over all positions from the keys'
    exponents and adds 1e-4, which shows the future to the past; that form is `stabilised`. And in
    W, whose directions are uniform here: there their signs are those that a QR leaves.

    Args:
        num_heads: H, for counting alone.
        key_dim: K.
        num_features: M; K ln K / 8, at least 1, by default.
        kernel: "relu" or "exp".

    Buffer: projection (M, K), W.

    Raises:
        ValueError: sizes below 1, or an unknown kernel.
    """

    projection: Tensor

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        num_features: int | None = None,
        *,
        kernel: RandomKernel = "relu",
    ) -> None:
        super().__init__()
        if num_features is None:
            num_features = max(1, int(key_dim * math.log(max(key_dim, 1)) / 8))
        if min(num_heads, key_dim, num_features) < 1:
            raise ValueError(
                f"num_heads={num_heads}, key_dim={key_dim}, num_features={num_features}: "
                "each must be at least 1"
            )
        _check_choice("kernel", kernel, get_args(RandomKernel))
        self.num_heads, self.num_features = num_heads, num_features
        self.kernel: RandomKernel = kernel
        self.register_buffer("projection", orthogonal_gaussian(num_features, key_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, K) -> (B, T, H, M)."""
        product, half_square = self._exponents(x)
        if self.kernel == "relu":
            return product.relu() + 1e-3
        return (product - half_square).exp() * self.num_features**-0.5

    def normalised(self, x: Tensor) -> Tensor:
        """phi(x) / sum(phi(x)), for queries: normalised attention does not feel the factor."""
        if self.kernel == "exp":  # without underflow, however long x is
            return self._exponents(x)[0].softmax(-1)
        features = self(x)
        return features / features.sum(-1, keepdim=True)

    def stabilised(self, x: Tensor, over: tuple[int, ...]) -> Tensor:
        """The public code's FAVOR+: (exp(W x' - |x'|^2 / 2 - max) + 1e-4) / sqrt(M).

        Args:
            x: (B, T, H, K).
            over: dimensions that the maximum of W x' is taken over: (3,) for queries, (1, 3) for
                keys, where every feature then depends on all positions.
        """
        product, half_square = self._exponents(x)
        exponents = product - half_square - product.amax(over, keepdim=True)
        return (exponents.exp() + 1e-4) * self.num_features**-0.5

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.num_heads * self.projection.numel()

    def _exponents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W x' (..., M) and |x'|^2 / 2 (..., 1)."""
        x = _widen(x)
        x = x * x.shape[-1] ** -0.25
        with torch.autocast(x.device.type, enabled=False):
            product = linear(x, self.projection.to(x.dtype))
        return product, x.square().sum(-1, keepdim=True) / 2


def orthogonal_gaussian(rows: int, width: int) -> Tensor:
    """(rows, width), orthogonal within blocks of `width` rows, each as long as a Gaussian one."""
    blocks = -(-rows // width)
    Q, R = torch.linalg.qr(torch.randn(blocks, width, width))
    # Factorisations fix signs as they like: without these the directions are not uniform.
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    return Q.mT.flatten(0, 1)[:rows] * torch.randn(rows, width).norm(dim=1, keepdim=True)


class HedgehogFeatureMap(FeatureMap):
    """Learned map per head, made to imitate softmax (Zhang et al. 2024, The Hedgehog & the
    Porcupine, section 4.2).

    With z = x W_h + b_h (or x + x W_h + b_h with `skip`), phi(x) is, over both signs of z,

        softmax     [softmax(z), softmax(-z)], two softmaxes over the features
        exp         [exp(z), exp(-z)], the paper's definition; overflows beyond |z| = 88
        exp_stable  [exp(z - max z), exp(-z + min z)], largest feature of each half 1
        joint       softmax([2z, -2z]), one softmax over both halves

    and every feature is at least 1e-12. A factor on phi(q) cancels in normalised attention; a
    factor on phi(k) re-weights the keys, so that the four are different attentions.

    Parameters: weight (H, K, f), applied as x @ weight; bias (H, f) where there is one.

    Differs from the paper in its default activation, softmax over features, which is that of the
    authors' later code (LoLCATs); `exp` is the paper's.

    Args:
        num_heads: H.
        head_dim: K.
        feature_dim: f; K by default. F = 2 f, or f with `halfspace`.
        activation: one of the above.
        halfspace: the half of +z alone; not defined for "joint".
        bias: learn b, from zero.
        skip: add x to x W; needs f = K.
        init: of W. "identity" is the paper's; "kaiming_per_head" draws uniformly with bound
            sqrt(6 / K); "zero_with_skip" starts at z = x and needs `skip`.

    Raises:
        ValueError: sizes below 1, or options that exclude each other.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_dim: int | None = None,
        *,
        activation: Activation = "softmax",
        halfspace: bool = False,
        bias: bool = False,
        skip: bool = False,
        init: MapInit = "identity",
    ) -> None:
        super().__init__()
        f = head_dim if feature_dim is None else feature_dim
        if min(num_heads, head_dim, f) < 1:
            raise ValueError(
                f"num_heads={num_heads}, head_dim={head_dim}, feature_dim={f}: "
                "each must be at least 1"
            )
        _check_choice("activation", activation, get_args(Activation))
        _check_choice("init", init, get_args(MapInit))
        if activation == "joint" and halfspace:
            raise ValueError("halfspace=True with activation='joint': it has no half of its own")
        if skip and f != head_dim:
            raise ValueError(f"skip=True with feature_dim={f}: expected head_dim={head_dim}")
        if init == "zero_with_skip" and not skip:
            raise ValueError("init='zero_with_skip' with skip=False: every feature would be equal")
        self.activation: Activation = activation
        self.halfspace = halfspace
        self.skip = skip
        self.init: MapInit = init
        self.num_features = f if halfspace else 2 * f
        if activation == "softmax" and not halfspace:
            self.operator_map = "hedgehog"
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, f))
        self.bias = nn.Parameter(torch.empty(num_heads, f)) if bias else None
        # Decay would pull W to zero: every weight equal.
        mark(self, "weight", *(["bias"] if bias else []), decay=False, own_init=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters as `init` says."""
        K, f = self.weight.shape[1:]
        if self.init == "identity":
            self.weight.copy_(torch.eye(K, f))
        elif self.init == "kaiming_per_head":
            bound = (6 / K) ** 0.5
            self.weight.uniform_(-bound, bound)
        else:
            self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def inputs(self, x: Tensor) -> Tensor:
        """z (B, T, H, f)."""
        x = _widen(x)
        with torch.autocast(x.device.type, enabled=False):
            z = torch.einsum("bthk,hkf->bthf", x, self.weight.to(x.dtype))
        if self.bias is not None:
            z = z + self.bias
        return z + x if self.skip else z

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, K) -> (B, T, H, F)."""
        z = self.inputs(x)
        if self.operator_map is not None:
            return features(z, self.operator_map)
        return self._activate(z).clamp(min=SMALLEST_FEATURE)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.weight.numel()

    def _activate(self, z: Tensor) -> Tensor:
        halves = [z] if self.halfspace else [z, -z]
        if self.activation == "joint":
            return torch.cat([2 * half for half in halves], dim=-1).softmax(-1)
        if self.activation == "softmax":
            return torch.cat([half.softmax(-1) for half in halves], dim=-1)
        if self.activation == "exp_stable":
            halves = [half - half.amax(-1, keepdim=True) for half in halves]
        return torch.cat([half.exp() for half in halves], dim=-1)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed: {', '.join(allowed)}")
