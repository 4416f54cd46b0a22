"""JRT-RNN's mixer: linear attention whose prefix is read in both directions.

B batch, T time, M longest prefix, D model width, H heads, K key width per head, F features per
head, V value width per head.
"""

from einops import rearrange
from torch import Tensor

from kernels.prefix_linear_attention import prefix_sums
from layers.feature_maps import TaylorFeatureMap
from layers.linear_attention import FeatureMapAttention, LinearAttentionState
from layers.projection import Dense, Projection
from layers.segments import Place, inside_prefix


class PrefixLinearAttention(FeatureMapAttention):
    """Linear attention over the Taylor map, plus a sum over the prefix that every token reads.

        y_t = (phi(q_t) S_t) / (phi(q_t).z_t + eps)
        S_t = sum_{s <= t} phi(k_s) v_s^T + sum_{s < M} phi(k'_s) v'_s^T,  z_t likewise

    k' and v' are projections of their own. Tokens of the prefix see all of it, later ones too;
    every token after it sees the past only. Without `prefix_len` the layer is causal linear
    attention, and after the prefix the same state goes on.
    Source: Arora et al. 2024 (Just read twice: closing the recall gap for recurrent language
    models), section 4.2; the Taylor map is Based's (Arora et al. 2024).

    `prefix_len` counts the tokens of a row's first document, padding left out, so that left
    padding changes nothing. It opens a sequence: with a state it is refused.

    Differs from the paper in the compressed Taylor map (the same kernel from fewer features) and
    in a prefix for each row in place of one for all; left padding is masked after the feature map.

    Args:
        d_model: D.
        num_heads: H.
        key_dim: K, 16 in the paper.
        value_dim: V; D / H by default.
        compressed: keep each product of the Taylor map once.
        eps: added to the sum of the weights, 1e-12 in the paper; the weights are at least 1/2.
        bias: biases in the projections.
        projection: makes the six projections.
        backend: form of the operators.

    Parameters: those of MultiHeadMixer; k_prefix_proj.weight (H*K, D) and v_prefix_proj.weight
    (H*V, D).

    Raises:
        ValueError: widths and numbers of heads that do not fit.
    """

    causal = "prefix"

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        key_dim: int = 16,
        value_dim: int | None = None,
        compressed: bool = True,
        eps: float = 1e-12,
        bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            rotary=False,
            bias=bias,
            projection=projection,
            backend=backend,
        )
        if eps < 0:
            raise ValueError(f"eps={eps}: expected at least 0")
        self.normalize = True
        self.eps = eps
        self.query_map = TaylorFeatureMap(key_dim, compressed=compressed)
        self.key_map = TaylorFeatureMap(key_dim, compressed=compressed)
        self.k_prefix_proj = projection(d_model, num_heads * key_dim, bias)
        self.v_prefix_proj = projection(d_model, num_heads * self.value_dim, bias)

    def past_sums(
        self,
        x: Tensor,
        where: Place,
        state: LinearAttentionState | None,
        segments: Tensor | None,
        prefix_len: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """The state's sums, or those of the prefix, which opens a sequence."""
        if prefix_len is None:
            return super().past_sums(x, where, state, segments, prefix_len)
        if state is not None:
            raise ValueError(
                "prefix_len and state: a prefix opens a sequence, a state continues one"
            )
        inside = inside_prefix(prefix_len, x.shape[0], x.shape[1], segments)  # (B, T)
        end = int(inside.any(0).nonzero().max()) + 1 if inside.any() else 0
        x, inside = x[:, :end], inside[:, :end, None, None]
        k = rearrange(self.k_prefix_proj(x), "b m (h k) -> b m h k", h=self.num_heads)
        v = rearrange(self.v_prefix_proj(x), "b m (h v) -> b m h v", h=self.num_heads)
        # Masked after the map: a key of zeros has the feature 1 and would still count.
        return prefix_sums(self.key_map(k).to(v.dtype) * inside, v)
