"""Hedgehog: linear attention with learned feature maps that imitate softmax.

B batch, T time, D model width, H heads, K key width per head.
"""

import torch
from torch import Tensor

from layers.attention import Attention
from layers.attention_transfer import Rows, feature_rows, softmax_rows, transfer_losses
from layers.feature_maps import Activation, HedgehogFeatureMap, MapInit
from layers.linear_attention import FeatureMapAttention
from layers.projection import Dense, Projection
from layers.segments import place


class HedgehogAttention(FeatureMapAttention):
    """Linear attention with a learned feature map per head, one for queries and one for keys.

        y_t = sum_{s <= t} phi_q(q_t).phi_k(k_s) v_s / (sum_{s <= t} phi_q(q_t).phi_k(k_s) + eps)

    Source: Zhang et al. 2024 (The Hedgehog & the Porcupine), section 4; the maps are
    layers.feature_maps.HedgehogFeatureMap, with features over both signs of a linear map of the
    rotated query or key. Trained with the model from scratch, or distilled from softmax attention
    with the same projections, whose parameters have the same names and shapes.

    Differs from the paper in the default activation, see HedgehogFeatureMap.

    Args:
        d_model: D.
        num_heads: H.
        num_kv_heads: heads of keys and values, a divisor of H; H by default. They are repeated
            before the map, which has weights for each of the H heads.
        head_dim: width of a head; D / H by default.
        feature_dim: outputs f of the map's matrix; head_dim by default.
        activation: "softmax", "exp", "exp_stable" or "joint".
        halfspace: features of one sign only.
        map_bias: a learned bias inside the map.
        skip: add the map's input to its product; needs feature_dim = head_dim.
        init: of the maps, "identity", "kaiming_per_head" or "zero_with_skip".
        tie: one map for queries and keys.
        rotary: rotate queries and keys by their positions; needs an even head_dim.
        rotary_base: see layers/rotary.py.
        normalize: divide by the sum of the weights.
        eps: added to that sum.
        bias: biases in the four projections.
        projection: makes the four projections.
        backend: form of kernels.linear_attention.

    Parameters: those of MultiHeadMixer, and query_map.weight, key_map.weight (H, head_dim, f),
    query_map.bias, key_map.bias (H, f) where `map_bias` is set; initialised here and without
    weight decay, which would pull the attention towards uniform.

    Raises:
        ValueError: options of the map that exclude each other, or sizes that do not fit.
    """

    query_map: HedgehogFeatureMap
    key_map: HedgehogFeatureMap

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_dim: int | None = None,
        activation: Activation = "softmax",
        halfspace: bool = False,
        map_bias: bool = False,
        skip: bool = False,
        init: MapInit = "identity",
        tie: bool = False,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        normalize: bool = True,
        eps: float = 1e-12,
        bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            rotary=rotary,
            rotary_base=rotary_base,
            bias=bias,
            projection=projection,
            backend=backend,
        )
        if eps < 0:
            raise ValueError(f"eps={eps}: expected at least 0")
        self.normalize = normalize
        self.eps = eps

        def feature_map() -> HedgehogFeatureMap:
            return HedgehogFeatureMap(
                num_heads,
                self.key_dim,
                feature_dim,
                activation=activation,
                halfspace=halfspace,
                bias=map_bias,
                skip=skip,
                init=init,
            )

        self.query_map = feature_map()
        self.key_map = self.query_map if tie else feature_map()

    def imitation_loss(
        self, x: Tensor, teacher: Attention, *, segments: Tensor | None = None
    ) -> dict[str, Tensor]:
        """How far this layer's attention weights are from those of `teacher` on the same input.

        Source: Zhang et al. 2024, section 4.2, equation 4 (attention weight distillation).

        Args:
            x: (B, T, D), what the teacher's layer reads.
            teacher: softmax attention with as many heads; its weights get no gradient.
            segments: int (B, T) document numbers or None.

        Returns:
            loss, the cross entropy to be minimised, whose minimum is teacher_entropy; then kl,
            xent, mse, teacher_entropy and student_entropy, see
            layers.attention_transfer.transfer_losses.

        Raises:
            ValueError: another number of heads, or weights that are not normalised.
        """
        self.check_input(x, None, segments)
        if not self.normalize:
            raise ValueError("normalize=False: only normalised weights can imitate softmax")
        if teacher.num_heads != self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: expected the teacher's {teacher.num_heads}"
            )
        positions = place(x, None, segments).positions
        with torch.no_grad():
            q, k, teacher_v = teacher.project(x, positions)
            k, teacher_v = teacher.to_all_heads(k), teacher.to_all_heads(teacher_v)
            imitated = softmax_rows(q, k, segments=segments)
        q, k, v = self.project(x, positions)
        student = self.attention_rows(q, self.to_all_heads(k), segments)
        v = self.to_all_heads(v)
        losses = transfer_losses(imitated, student, teacher_v, v, segments=segments)
        return {"loss": losses["xent"], **losses}

    def attention_rows(self, q: Tensor, k: Tensor, segments: Tensor | None) -> Rows:
        """The attention weights of q, k (B, T, H, K), for a few queries at a time."""
        phi_q, phi_k = self.query_map(q), self.key_map(k)
        return feature_rows(phi_q, phi_k, eps=self.eps, segments=segments)
