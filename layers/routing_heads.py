"""What strict and top-w routing attention share: projections, centroids, local heads.

B batch, T time, D model width, H routing heads, K clusters, Dh head width.
"""

from abc import abstractmethod
from typing import Any, get_args

import torch
from einops import rearrange
from torch import Tensor

from kernels.routing_attention import SelfRule, similarity_flops, unit
from layers.kmeans_router import KMeansRouter, Update
from layers.mixer import Mixer
from layers.projection import Dense, Projection, projection_flops
from layers.report import Report
from layers.rotary import rotate, rotation
from layers.segments import Place, place
from layers.sliding_window import SlidingWindowAttention


class RoutingHeads(Mixer):
    """Heads of routing attention beside heads of sliding-window attention.

    y_t = W_o concat_h(routing head h) + (the local heads, with projections of their own),
    which is one projection of all heads side by side.

    Parameters, as (out, in) of a dense projection, with H routing heads: q_proj.weight (H*Dh, D);
    k_proj.weight (H*Dh, D) unless queries and keys are shared; v_proj.weight (H*Dh, D);
    o_proj.weight (D, H*Dh); local.* as of SlidingWindowAttention, whose heads are the others.
    Buffers: router.* as of KMeansRouter.
    """

    bounded_state = True

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_routing_heads: int | None = None,
        head_dim: int | None = None,
        num_clusters: int = 16,
        window: int = 64,
        local_window: int = 128,
        shared_qk: bool = True,
        self_rule: SelfRule = "last_resort",
        rotary: bool = True,
        rotary_base: float = 10000.0,
        decay: float = 0.999,
        update: Update = "count_ema",
        commitment: float = 1e-4,
        bias: bool = False,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        routing = max(1, num_heads // 2) if num_routing_heads is None else num_routing_heads
        _check(d_model, num_heads, routing, head_dim, window, self_rule, commitment)
        self.d_model = d_model
        self.num_heads = routing
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        if rotary and self.head_dim % 2:
            raise ValueError(
                f"rotary=True with {self.head_dim} features per head: "
                "rotary positions need an even number"
            )
        self.window = window
        self.self_rule: SelfRule = self_rule
        self.shared_qk = shared_qk
        self.rotary = rotary
        self.rotary_base = rotary_base
        self.commitment = commitment
        self.backend = backend
        width = routing * self.head_dim
        self.q_proj = projection(d_model, width, bias)
        self.k_proj = None if shared_qk else projection(d_model, width, bias)
        self.v_proj = projection(d_model, width, bias)
        self.o_proj = projection(width, d_model, bias)
        self.router = KMeansRouter(routing, num_clusters, self.head_dim, decay=decay, update=update)
        self.local: SlidingWindowAttention | None = None
        if routing < num_heads:
            self.local = SlidingWindowAttention(
                d_model,
                num_heads=num_heads - routing,
                window=local_window,
                head_dim=self.head_dim,
                rotary=rotary,
                rotary_base=rotary_base,
                bias=bias,
                projection=projection,
                backend=backend,
            )

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        where = place(x, state, segments)
        valid = None if segments is None else segments >= 0
        q = rearrange(self.q_proj(x), "b t (h d) -> b t h d", h=self.num_heads)
        v = rearrange(self.v_proj(x), "b t (h d) -> b t h d", h=self.num_heads)
        routed = [q]
        if self.k_proj is not None:
            routed.append(rearrange(self.k_proj(x), "b t (h d) -> b t h d", h=self.num_heads))
        self.router.prepare(routed, valid)
        y, labels, heads = self.route(routed, v, where, state, segments, want_state, report)
        for vectors, label in zip(routed, labels, strict=True):
            self.router.observe(vectors, label, valid)
        if report is not None:
            self.router.tell(report, routed, labels, valid, self.commitment)
        y = self.o_proj(y.flatten(2))
        local = None
        if self.local is not None:
            past = None if state is None else state.local
            z, local = self.local(x, past, segments=segments, want_state=want_state)
            y = y + z
        if not want_state:
            return y, None
        return y, self.state_type(heads, where.length, where.last, local)

    @abstractmethod
    def route(
        self,
        routed: list[Tensor],
        v: Tensor,
        where: Place,
        state: Any,
        segments: Tensor | None,
        want_state: bool,
        report: Report | None,
    ) -> tuple[Tensor, list[Tensor], Any]:
        """The routing heads.

        Args:
            routed: the queries (B, T, H, Dh), and the keys unless they are shared.

        Returns:
            y (B, T, H, Dh), the labels (B, T, H) of each of `routed`, and what the state holds of
            these heads, if asked for.
        """

    def attended(self, routed: list[Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as attention sees them: shared keys of unit length, both rotated."""
        q, *separate = routed
        k = separate[0] if separate else unit(q).to(q.dtype)
        if self.rotary:
            by = rotation(positions, self.head_dim, self.rotary_base, q.dtype)
            q, k = rotate(q, by), rotate(k, by)
        return q, k

    def routing_flops(self, tokens: int) -> int:
        """FLOPs of the routing heads' projections and of comparing with the centroids."""
        layers = [self.q_proj, self.k_proj, self.v_proj, self.o_proj]
        dense = sum(projection_flops(layer, tokens) for layer in layers if layer is not None)
        compared = 1 if self.shared_qk else 2
        return dense + compared * similarity_flops(
            1, tokens, self.num_heads, self.head_dim, self.router.num_clusters
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of the activations outside autocast."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device


def _check(
    d_model: int,
    num_heads: int,
    routing: int,
    head_dim: int | None,
    window: int,
    self_rule: str,
    commitment: float,
) -> None:
    if d_model < 1 or num_heads < 1:
        raise ValueError(f"d_model={d_model}, num_heads={num_heads}: each must be at least 1")
    if not 1 <= routing <= num_heads:
        raise ValueError(
            f"num_routing_heads={routing}: allowed: 1 to num_heads={num_heads}, the rest is local"
        )
    if head_dim is None and d_model % num_heads:
        raise ValueError(
            f"num_heads={num_heads}: expected a divisor of d_model={d_model}, or head_dim given"
        )
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim={head_dim}: expected at least 1")
    if window < 1:
        raise ValueError(f"window={window}: expected at least 1, the token itself")
    if self_rule not in get_args(SelfRule):
        raise ValueError(f"self_rule={self_rule!r}: allowed: {', '.join(get_args(SelfRule))}")
    if commitment < 0:
        raise ValueError(f"commitment={commitment}: expected at least 0")
