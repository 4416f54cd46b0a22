"""What teaches SEA's estimator, the distance of its picture from an attention matrix, and what its
mask is like.

B batch, T time, S keys, H heads, K key width per head, V value width per head, M cells, t queries
of a chunk, L tokens that a query sees.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.estimated_sparse_attention import Visible, cell_starts, stretch, visible

KL_WEIGHT = 0.1  # of a KL divergence beside the mean squared error of the same two matrices
_CHUNK = 1 << 22  # scores of a chunk of queries, B and H included


class Distance(NamedTuple):
    """Between attention matrices of teacher and student, each a scalar.

    kl: KL(teacher || student) in nats, the mean over queries and heads. mse: mean squared error of
    the probabilities, over all tokens of the query's document. teacher_entropy, entropy: of the
    teacher's and the student's rows in nats.
    """

    kl: Tensor
    mse: Tensor
    teacher_entropy: Tensor
    entropy: Tensor

    @property
    def loss(self) -> Tensor:
        """0.1 kl + mse."""
        return KL_WEIGHT * self.kl + self.mse


def dense_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q.k of q (B, t, H, K) and k (B, S, G, K), as (B, H, t, S) in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    with torch.autocast(q.device.type, enabled=False):
        return torch.einsum("bthk,bshk->bhts", q.to(dtype) * scale, k.to(dtype))


def distance(teacher: Tensor, student: Tensor, seen: Visible, sizes: Tensor) -> Tensor:
    """The sums over queries and heads that `Distance` is the means of: (4,).

    Args:
        teacher, student: (B, H, t, S) scores before the softmax.
        seen: of these t queries.
        sizes: (B, t) tokens of each query's document.
    """
    _, mask = seen.numbers()
    log_p, log_s = (_log_softmax(x, mask[:, None]) for x in (teacher, student))
    p, s = log_p.exp() * mask[:, None], log_s.exp() * mask[:, None]
    error = (p - s).square().sum(-1) / sizes.clamp(min=1)[:, None]
    kl = (p * (log_p - log_s)).sum(-1)
    entropies = (-(p * log_p).sum(-1), -(s * log_s).sum(-1))
    valid = (seen.lengths > 0)[:, None]
    return torch.stack([(x * valid).sum() for x in (kl, error, *entropies)])


def _log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over what the mask leaves, zero elsewhere; finite, gradients too, where it leaves nothing."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1).masked_fill(~mask, 0)


def sampled_rows(length: int, count: int, training: bool, device: torch.device) -> Tensor:
    """int64 (n,), n = min(count, length) queries: random ones in training, else at equal steps."""
    count = min(count, length)
    if training:
        return torch.randint(length, (count,), device=device)
    return (torch.arange(count, device=device) + 1) * length // count - 1


def sampled_distance(
    q: Tensor,
    k: Tensor,
    scores: Tensor,
    rows: Tensor,
    scale: float,
    segments: Tensor | None,
    *,
    causal: bool = True,
) -> Distance:
    """Between the layer's own dense attention, which gets no gradient, and its estimate.

    Of the queries `rows` alone, so that the cost is linear in T.

    Args:
        q: (B, T, H, K).
        k: (B, S, G, K), the queries being the last T of S positions.
        scores: (B, H, T, M), compressed.
        rows: int64 (n,), below T.
        segments: int (B, S) or None.
        causal: whether a query sees its document up to itself, or all of it.
    """
    B, T = q.shape[:2]
    seen, sizes = _places(B, T, k.shape[1], segments, q.device, causal)
    some = Visible(seen.lengths[:, rows], seen.first[:, rows], seen.index)
    with torch.no_grad():
        teacher = dense_scores(q[:, rows], k, scale)
    student = stretch(scores[:, :, rows], some, 0.0)
    sums = distance(teacher, student, some, sizes[:, rows])
    return _means(sums, int(some.lengths.shape[1]) * q.shape[2], some)


class Matrices(NamedTuple):
    """What the two attention matrices and the estimate of one layer are made of.

    q, k and teacher_q, teacher_k: (B, T, H, K) and (B, T, G, K); scores: (B, H, T, M).
    """

    teacher_q: Tensor
    teacher_k: Tensor
    q: Tensor
    k: Tensor
    scores: Tensor


def imitation_distances(
    given: Matrices, teacher_scale: float, scale: float, segments: Tensor | None
) -> tuple[Distance, Distance]:
    """Of the teacher's matrix from the stretched estimate, and from the student's dense attention.

    Queries go in chunks, which the backward pass makes again: memory is linear in T.
    """
    B, T, H, _ = given.q.shape
    seen, sizes = _places(B, T, T, segments, given.q.device, causal=True)

    def chunk(start: int, end: int, *tensors: Tensor) -> Tensor:
        teacher_q, teacher_k, q, k, scores = tensors
        here = seen.rows(start, end)
        rows = slice(start, end)
        teacher = dense_scores(teacher_q[:, rows], teacher_k, teacher_scale)
        estimate = stretch(scores[:, :, rows], here, 0.0)
        dense = dense_scores(q[:, rows], k, scale)
        return torch.stack([distance(teacher, x, here, sizes[:, rows]) for x in (estimate, dense)])

    total = torch.zeros((), device=given.q.device)
    step = max(1, _CHUNK // (B * H * T))
    for start in range(0, T, step):
        end = min(start + step, T)
        if torch.is_grad_enabled():
            sums = checkpoint(
                chunk, start, end, *given, use_reentrant=False, preserve_rng_state=False
            )
        else:
            sums = chunk(start, end, *given)
        total = total + sums
    estimate, dense = (_means(x, T * H, seen) for x in total)
    return estimate, dense


def imitation_losses(
    estimate: Distance,
    student: Distance,
    out: Tensor,
    context: Tensor,
    segments: Tensor | None,
) -> dict[str, Tensor]:
    """The sum that is minimised and, without gradient, what it is made of.

    Args:
        estimate, student: of the estimate and of dense attention from the teacher's.
        out, context: (B, T, H, V), what student and teacher attended to.
        segments: int (B, T) or None; padding does not count.
    """
    error = (out - context).square().to(estimate.kl.dtype).mean((2, 3))
    if segments is not None:
        error = error[segments >= 0]
    context_mse = error.sum() / max(1, error.numel())
    logged = {
        "kl": estimate.kl,
        "mse": estimate.mse,
        "student_kl": student.kl,
        "student_mse": student.mse,
        "context_mse": context_mse,
        "entropy": estimate.entropy,
        "teacher_entropy": estimate.teacher_entropy,
    }
    loss = estimate.loss + student.loss + context_mse
    return {"loss": loss, **{name: value.detach() for name, value in logged.items()}}


def mask_statistics(cells: Tensor, seen: Visible) -> dict[str, Tensor]:
    """Tokens that a query and head attends to in the mean, and the share that attends to none.

    `cells` bool (B, H, T, M), those chosen.
    """
    widths = cell_starts(seen.lengths, cells.shape[3]).diff(dim=-1)  # (B, T, M) tokens of each cell
    attended = (cells * widths[:, None]).sum(-1)
    valid = (seen.lengths > 0)[:, None].expand_as(attended)
    count = valid.sum().clamp(min=1)
    return {
        "tokens_attended": attended.sum() / count,
        "empty_rows": ((attended == 0) & valid).sum() / count,
    }


def _places(
    batch: int,
    queries: int,
    keys: int,
    segments: Tensor | None,
    device: torch.device,
    causal: bool,
) -> tuple[Visible, Tensor]:
    """What each query sees, and how many tokens its document has, (B, T)."""
    seen, whole = (
        visible(batch, queries, keys, causal=each, segments=segments, device=device)
        for each in (causal, False)
    )
    return seen, whole.lengths


def _means(sums: Tensor, pairs: int, seen: Visible) -> Distance:
    """Sums over the pairs of query and head, divided by the number of those that see something.

    Args:
        pairs: of one sequence without padding.
    """
    share = (seen.lengths > 0).to(sums.dtype).mean() * len(seen.lengths) * pairs
    return Distance(*(sums / share.clamp(min=1)))
