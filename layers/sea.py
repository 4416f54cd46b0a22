"""SEA: linear attention estimates where softmax attention will look, and it looks only there.

B batch, T time, S slots of the cache, D model width, H heads, G key and value heads, K key and
value width per head, M cells.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.estimated_sparse_attention import (
    estimated_sparse_attention,
    estimated_sparse_attention_flops,
    visible,
)
from layers.attention import Attention
from layers.feature_maps import RandomKernel
from layers.kv_cache import KVCache, empty_cache, remember
from layers.multihead import MultiHeadMixer
from layers.projection import Dense, Projection
from layers.report import Report
from layers.running_mean import running_mean, running_mean_flops
from layers.sea_decoder import COLUMNS
from layers.sea_estimator import Estimator, EstimatorState, Gates
from layers.sea_losses import (
    Matrices,
    dense_scores,
    imitation_distances,
    imitation_losses,
    mask_statistics,
    sampled_distance,
    sampled_rows,
)
from layers.sea_maps import AttentionMaps, attention_maps
from layers.segments import Place, keep_rows, place
from layers.state import state_nbytes

Groups = Literal["causal_batch", "query"]
Beyond = Literal["refuse", "last"]


@dataclass(frozen=True, eq=False)
class SEAState:
    """What the layer remembers of the document each row ended in."""

    cache: KVCache  # keys and values (B, S, G, K), and which document and how much of it
    estimator: EstimatorState
    v_sum: Tensor  # (B, G, K) of all values, float32 or float64


class _Mixed(NamedTuple):
    """One pass between the projections."""

    out: Tensor  # (B, T, H, K)
    scores: Tensor  # (B, H, T, M) compressed, before the softmax over cells
    cells: Tensor  # bool (B, H, T, M), those chosen
    gates: Gates
    keys: Tensor  # (B, S, G, K), the past's too
    tags: Tensor | None  # (B, S), their documents
    state: SEAState | None


class SEA(MultiHeadMixer):
    """Sparse attention on a mask that a small network predicts at linear cost.

        score_t, s_prob, s_mix = Estimator(q, k, v)_t,   p_t = softmax of score_t over M cells
        C_t = the tokens s <= t under the largest p_t, about k_cells for each head
        y_t = s_mix s_prob sum_{s in C_t} softmax_{s in C_t}(q_t.k_s / sqrt(K)) v_s
              + (1 - s_mix) mean_{s <= t} v_s

    The M cells span what a query sees (kernels.estimated_sparse_attention); the estimator is
    layers.sea_estimator.Estimator. Time and memory are linear in T, forward and backward. The
    state grows with the document: the sparse attention may read any past token.

    Source: Lee et al. 2024 (SEA: Sparse Linear Attention with Estimated Attention Mask), sections
    3.2 to 3.4, after the causal form of its public code.

    The choice of cells passes no gradient, so that the decoder of the mask learns from a loss of
    its own: `imitation_loss` of a trained softmax layer, which is the paper's; or, without a
    teacher, the loss "estimation" of a report, 0.1 KL + MSE of the estimate from the layer's own
    dense attention on `estimation_rows` queries, random ones in training. Without either the mask
    stays random.

    Differs from the paper in rotary positions (`rotary=False` is its form) and in the loss without
    a teacher; from its code in no jitter of the cells, no oversampling, random features that are
    never redrawn, and a position table that is not stretched over longer texts, which would tell
    a token how long its text is going to be.

    Args:
        d_model: D.
        num_heads: H.
        k_cells: k, tokens per query and head; may be raised after training.
        num_cells: M, a multiple of 4, at most max_len.
        max_len: rows of the position table.
        beyond: tokens of a document after max_len "refuse", or share the "last" row.
        grouping: what competes for the cells of a query: all heads ("causal_batch") or each for
            itself ("query").
        num_features: random features; K ln K / 8 by default.
        kernel: of the random features, "relu" (the public code) or "exp" (the paper's FAVOR+).
        estimation_rows: queries per sequence of the loss without a teacher; 0 for no such loss.
        num_kv_heads: G, a divisor of H; H by default.
        head_dim: K; D / H by default.
        rotary: rotate queries and keys by their positions; needs an even head_dim.
        rotary_base: see layers/rotary.py.
        bias: biases in the four projections.
        projection: makes the four projections; the estimator stays dense.
        backend: form of the operators.

    Parameters: those of MultiHeadMixer; estimator as of Estimator, with torch's own initialisation.

    Raises:
        ValueError: sizes that do not fit, more cells than tokens, or an unknown choice.
    """

    bounded_state = False
    state_type = SEAState

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        k_cells: int = 32,
        num_cells: int = 128,
        max_len: int = 2048,
        beyond: Beyond = "refuse",
        grouping: Groups = "causal_batch",
        num_features: int | None = None,
        kernel: RandomKernel = "relu",
        estimation_rows: int = 32,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
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
        check_cells(k_cells, num_cells, max_len)
        check_choice("beyond", beyond, get_args(Beyond))
        check_choice("grouping", grouping, get_args(Groups))
        if estimation_rows < 0:
            raise ValueError(f"estimation_rows={estimation_rows}: expected at least 0")
        self.k_cells, self.num_cells, self.max_len = k_cells, num_cells, max_len
        self.beyond, self.estimation_rows = beyond, estimation_rows
        self.grouping: Groups = grouping
        self.estimator = Estimator(
            num_heads,
            self.key_dim,
            num_cells,
            max_len,
            num_features=num_features,
            kernel=kernel,
            backend=backend,
        )

    def forward(
        self,
        x: Tensor,
        state: SEAState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, SEAState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract.

        With `segments` the state takes the shape of its longest row, which a GPU must tell the
        host: `want_state` then waits for the device.
        """
        self.check_input(x, state, segments)
        where = place(x, None if state is None else state.cache, segments)
        q, k, v = self.project(x, where.positions)
        learn = report is not None and self.estimation_rows > 0
        mixed = self._mix(q, k, v, where, state, segments, want_state=want_state, learn=learn)
        if report is not None:
            self._report(q, mixed, report)
        return self.merge(mixed.out), mixed.state

    def imitation_loss(
        self, x: Tensor, teacher: Attention, *, segments: Tensor | None = None
    ) -> dict[str, Tensor]:
        """How far the layer is from a softmax layer that reads the same input.

            estimate    0.1 KL(A* || softmax of the stretched scores) + MSE of the two
            student     0.1 KL(A* || softmax(q k^T / sqrt(K))) + MSE of the two
            context     MSE of the heads' outputs, before the output projection

        with A* the teacher's attention matrix; "loss" is the sum of the three. Means are over
        valid queries and heads. Source: Lee et al. 2024 (SEA), section 3.5, after its public code.
        Time is quadratic in T, as of any comparison of attention matrices; memory is not: queries
        go in chunks, which the backward pass makes again.

        Args:
            x: (B, T, D), the input of both layers.
            teacher: softmax attention with as many heads, as wide; it gets no gradient.
            segments: as of `forward`.

        Returns:
            "loss", then without gradient "kl" and "mse" (of the estimate), "student_kl",
            "student_mse", "context_mse", "entropy" (of the estimate) and "teacher_entropy", in
            nats.

        Raises:
            ValueError: a teacher whose heads are not the layer's, or what `check_input` refuses.
        """
        self.check_input(x, None, segments)
        if (teacher.num_heads, teacher.value_dim) != (self.num_heads, self.value_dim):
            raise ValueError(
                f"teacher has {teacher.num_heads} heads of {teacher.value_dim}; "
                f"expected {self.num_heads} of {self.value_dim}"
            )
        where = place(x, None, segments)
        with torch.no_grad():
            q, k, v = teacher.project(x, where.positions)
            context = attention(q, k, v, segments=segments, backend=teacher.backend)
        own_q, own_k, own_v = self.project(x, where.positions)
        mixed = self._mix(own_q, own_k, own_v, where, None, segments, learn=True)
        given = Matrices(q, k, own_q, own_k, mixed.scores)
        estimate, student = imitation_distances(
            given, teacher.key_dim**-0.5, self.key_dim**-0.5, segments
        )
        return imitation_losses(estimate, student, mixed.out, context, segments)

    @torch.no_grad()
    def attention_maps(self, x: Tensor, *, segments: Tensor | None = None) -> AttentionMaps:
        """Every head's attention as (B, H, T, T) matrices, and how it came about.

        For reading and drawing, at small T: nothing else builds matrices of that size.
        """
        self.check_input(x, None, segments)
        where = place(x, None, segments)
        q, k, v = self.project(x, where.positions)
        mixed = self._mix(q, k, v, where, None, segments)
        dense = dense_scores(q, k, self.key_dim**-0.5)
        return attention_maps(dense, mixed.scores, mixed.cells, mixed.gates, segments)

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SEAState:
        """No tokens; the first append takes memory for `max_len` of them at once."""
        device = self.device if device is None else device
        dtype = self.dtype if dtype is None else dtype
        cache = empty_cache(batch_size, max_len, self.num_kv_heads, self.key_dim, device, dtype)
        estimator = self.estimator.new_state(batch_size, device, dtype)
        shape = (batch_size, self.num_kv_heads, self.value_dim)
        return SEAState(cache, estimator, estimator.z.new_zeros(shape))

    def state_bytes(self, batch_size: int, length: int) -> int:
        """Keys and values of `length` slots, and what does not grow; spare room not counted."""
        return state_nbytes(self.new_state(batch_size, length, "meta"))

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, the estimator, scores and weighted sums, and the running mean."""
        sparse = estimated_sparse_attention_flops(
            batch_size,
            length,
            self.num_heads,
            self.key_dim,
            self.num_cells,
            self.k_cells,
            grouping=self.grouping,
        )
        mean = running_mean_flops(batch_size, length, self.num_kv_heads, self.value_dim)
        estimator = self.estimator.flops(batch_size, length)
        return self.projection_flops(batch_size * length) + estimator + sparse + mean

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        where: Place,
        state: SEAState | None,
        segments: Tensor | None,
        *,
        want_state: bool = False,
        learn: bool = False,
    ) -> _Mixed:
        """Everything between the projections. `learn`: the scores carry a gradient."""
        if self.beyond == "refuse" and (longest := int(where.positions.max()) + 1) > self.max_len:
            raise ValueError(
                f"a document of {longest} tokens; expected at most max_len={self.max_len}, "
                "or beyond='last'"
            )
        scores, gates, estimator = self.estimator(
            q * self.key_dim**-0.5,
            self._per_head(k),
            self._per_head(v),
            where,
            None if state is None else state.estimator,
            segments,
            want_state=want_state,
            learn=learn,
        )
        cache = None if state is None else state.cache
        keys, values, tags, cache = remember(cache, k, v, where, segments, want_state)
        attended, cells = estimated_sparse_attention(
            q,
            keys,
            values,
            scores.detach().softmax(-1),
            k_cells=self.k_cells,
            grouping=self.grouping,
            segments=tags,
            return_cells=True,
            backend=self.backend,
        )
        past = None
        if state is not None:
            past = keep_rows(where.carry, state.v_sum), keep_rows(where.carry, state.cache.length)
        mean, v_sum = running_mean(
            v, past, segments=segments, want_state=want_state, backend=self.backend
        )
        attended, mean = attended.to(v.dtype), self._per_head(mean)
        out = gates.mix * (gates.prob * attended) + (1 - gates.mix) * mean
        after = None
        if cache is not None and estimator is not None and v_sum is not None:
            after = SEAState(cache, estimator, v_sum)
        return _Mixed(out, scores, cells, gates, keys, tags, after)

    def _per_head(self, x: Tensor) -> Tensor:
        """(B, T, G, K) -> (B, T, H, K)."""
        if self.num_kv_heads == self.num_heads:
            return x
        return x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)

    def _report(self, q: Tensor, mixed: _Mixed, report: Report) -> None:
        """The loss of the estimate where there is no teacher, and what the mask is like."""
        B, T = q.shape[:2]
        if self.estimation_rows:
            rows = sampled_rows(T, self.estimation_rows, self.training, q.device)
            scale = self.key_dim**-0.5
            found = sampled_distance(
                q.detach(), mixed.keys.detach(), mixed.scores, rows, scale, mixed.tags
            )
            report.loss("estimation", found.loss)
            report.stat("estimate_kl", found.kl)
        seen = visible(B, T, mixed.keys.shape[1], causal=True, segments=mixed.tags, device=q.device)
        for name, value in mask_statistics(mixed.cells, seen).items():
            report.stat(name, value)


def check_cells(k_cells: int, num_cells: int, max_len: int) -> None:
    """Raise ValueError unless cells can be drawn and chosen."""
    if k_cells < 1:
        raise ValueError(f"k_cells={k_cells}: expected at least 1")
    if num_cells < COLUMNS or num_cells % COLUMNS:
        raise ValueError(f"num_cells={num_cells}: expected a positive multiple of {COLUMNS}")
    if num_cells > max_len:
        raise ValueError(f"num_cells={num_cells}: expected at most max_len={max_len}, the tokens")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed: {', '.join(allowed)}")
