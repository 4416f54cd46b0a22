"""SEA's estimator: what each query will look at, and how much that matters, at linear cost.

B batch, T time, H heads, D head width, F random features, M cells.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from kernels.linear_attention import linear_attention, linear_attention_flops
from layers.feature_maps import PerformerFeatureMap, RandomKernel
from layers.marks import mark
from layers.projection import projection_flops
from layers.sea_decoder import CausalDecoder, Rows, keep_own_init
from layers.segments import Place, keep_rows

EPS = 1e-6  # of linear attention's denominator, relative to the sum of a query's features


class Gates(NamedTuple):
    """(B, T, H, 1) each, in (0, 1): of the sparse attention, and of it beside the mean of v."""

    prob: Tensor
    mix: Tensor


@dataclass(frozen=True, eq=False)
class EstimatorState:
    """What the estimator remembers of the document each row ended in."""

    S: Tensor  # (B, H, F, 2D) sum of phi(k) [P ; v]^T, float32 or float64
    z: Tensor  # (B, H, F) sum of phi(k)
    rows: Rows  # (B, 4, 2H, M/4) each


class Encoder(nn.Module):
    """e = GELU(LayerNorm(W [c ; v] + b)), (B, T, H, 3D) -> (B, T, H, 2D), and the gates from it.

    Source: Lee et al. 2024 (SEA), section 3.2, after its public code. The same for every head.

    Parameters: linear.weight (2D, 3D), norm.weight (2D,), gate.weight (2, 2D), and their biases.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * head_dim, 2 * head_dim)
        self.norm = nn.LayerNorm(2 * head_dim)
        self.gate = nn.Linear(2 * head_dim, 2)
        keep_own_init(self.linear, self.gate)

    def forward(self, z: Tensor) -> tuple[Tensor, Gates]:
        """e and the gates of z (B, T, H, 3D)."""
        e = gelu(self.norm(self.linear(z)))
        return e, Gates(*self.gate(e).sigmoid().split(1, dim=-1))

    def flops(self, pairs: int) -> int:
        """FLOPs over `pairs` of token and head."""
        return projection_flops(self.linear, pairs) + projection_flops(self.gate, pairs)


class Estimator(nn.Module):
    """Gates and compressed scores from linear attention over positions and values.

        c_t = sum_{s <= t} phi(q_t).phi(k_s) [P_s ; v_s] / sum_{s <= t} phi(q_t).phi(k_s)
        e_t, gates = Encoder([c_t ; v_t]),   score_t = CausalDecoder(e_{t-8..t})

    Attending to P, a learned row for each position, tells where a query looks. Source: Lee et al.
    2024 (SEA), section 3.2, after the causal form of its public code.

    Args:
        num_heads, head_dim: H and D.
        num_cells: M.
        max_len: rows of P; later positions share its last.
        num_features, kernel: of the random features.
        backend: form of kernels.linear_attention.

    Parameters: position_table (max_len, D); encoder as of Encoder, decoder as of CausalDecoder.
    Buffer: feature_map.projection (F, D).
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_cells: int,
        max_len: int,
        *,
        num_features: int | None,
        kernel: RandomKernel,
        backend: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.backend = num_heads, head_dim, backend
        self.feature_map = PerformerFeatureMap(num_heads, head_dim, num_features, kernel=kernel)
        self.position_table = nn.Parameter(torch.randn(max_len, head_dim))
        mark(self, "position_table", own_init=True)
        self.encoder = Encoder(head_dim)
        self.decoder = CausalDecoder(num_heads, head_dim, num_cells)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        where: Place,
        state: EstimatorState | None,
        segments: Tensor | None,
        *,
        want_state: bool,
        learn: bool,
    ) -> tuple[Tensor, Gates, EstimatorState | None]:
        """Scores (B, H, T, M) before the softmax over cells, the gates, and the state.

        Args:
            q, k, v: (B, T, H, D), q times the scale of the scores.
            where: of `place`.
            learn: whether the scores carry a gradient. Nothing of it is kept: the backward pass
                decodes again.
        """
        context, sums = self.context(q, k, v, where, state, segments, want_state)
        e, gates = self.encoder(torch.cat([context, v], -1))
        past = self.decoder.no_rows(e)
        if state is not None:
            past = Rows(*(keep_rows(where.carry, rows) for rows in state.rows))
        if learn and torch.is_grad_enabled():
            scores, rows = checkpoint(
                self.decoder, e, past, segments, want_state,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            with torch.no_grad():
                scores, rows = self.decoder(e, past, segments, want_state)
        after = None if sums is None or rows is None else EstimatorState(*sums, rows)
        return scores, gates, after

    def context(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        where: Place,
        state: EstimatorState | None,
        segments: Tensor | None,
        want_state: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """c (B, T, H, 2D), and the sums after it."""
        rows = where.positions.clamp(max=len(self.position_table) - 1)
        P = self.position_table[rows].to(v.dtype).unsqueeze(-2)  # (T, 1, D) or (B, T, 1, D)
        past = None
        if state is not None:
            past = keep_rows(where.carry, state.S), keep_rows(where.carry, state.z)
        mixed = linear_attention(
            self.feature_map.normalised(q).to(v.dtype),
            self.feature_map(k).to(v.dtype),
            torch.cat([P.expand_as(v), v], -1),
            eps=EPS,
            initial_state=past,
            return_state=want_state,
            segments=segments,
            backend=self.backend,
        )
        return mixed if isinstance(mixed, tuple) else (mixed, None)

    def new_state(
        self, batch_size: int, device: torch.device | str, dtype: torch.dtype
    ) -> EstimatorState:
        """Zeros."""
        features, width = self.feature_map.num_features, 2 * self.head_dim
        exact = torch.promote_types(self.position_table.dtype, torch.float32)
        z = torch.zeros(batch_size, self.num_heads, features, device=device, dtype=exact)
        rows = self.decoder.no_rows(torch.zeros(batch_size, device=device, dtype=dtype))
        return EstimatorState(z.new_zeros(*z.shape, width), z, rows)

    def flops(self, batch_size: int, length: int) -> int:
        """FLOPs of a forward pass, as FlopCounterMode counts them."""
        tokens, width = batch_size * length, 2 * self.head_dim
        context = linear_attention_flops(
            batch_size, length, self.num_heads, self.feature_map.num_features, width
        )
        return (
            2 * self.feature_map.flops(tokens)
            + context
            + self.encoder.flops(tokens * self.num_heads)
            + self.decoder.flops(tokens)
        )
