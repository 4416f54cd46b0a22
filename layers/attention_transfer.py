"""Attention transfer: how far a layer's attention weights are from those of softmax attention.

B batch, T time, H heads, D head width, F features, V value width, C queries at a time, W window.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.precision import accumulation_dtype
from layers.feature_maps import FeatureMap

# The attention weights (B, H, C, E) of the queries `rows` over the keys 0 .. E - 1, E = rows.stop:
# not negative, each row with the sum 1.
Rows = Callable[[slice], Tensor]

SMALLEST_WEIGHT = 1e-12  # of the student, inside the logarithm
CHUNK = 128


def attention_transfer_loss(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_map: FeatureMap,
    key_map: FeatureMap,
    *,
    teacher: Tensor | None = None,
    eps: float = 1e-12,
    segments: Tensor | None = None,
    chunk: int = CHUNK,
) -> dict[str, Tensor]:
    """Linear attention with the two maps against softmax attention of the same q, k and v.

    Args:
        q, k: (B, T, H, D).
        v: (B, T, H, V).
        query_map, key_map: (B, T, H, D) -> (B, T, H, F).
        teacher: the weights to imitate, (B, H, T, T), in place of softmax(q k^T / sqrt(D)).
        eps: added to the student's normaliser.
        segments, chunk: as of `transfer_losses`, which says what is returned.
    """
    imitated = softmax_rows(q, k, segments=segments) if teacher is None else _rows_of(teacher)
    student = feature_rows(query_map(q), key_map(k), eps=eps, segments=segments)
    return transfer_losses(imitated, student, v, v, segments=segments, chunk=chunk)


def transfer_losses(
    teacher: Rows,
    student: Rows,
    teacher_values: Tensor,
    student_values: Tensor,
    *,
    segments: Tensor | None = None,
    chunk: int = CHUNK,
) -> dict[str, Tensor]:
    """Means over batch, heads and queries, every query counting equally, padding not at all.

        xent = - sum_j T_ij log P_ij,   kl = xent - entropy of T,   mse = |P v - T v'|^2 / V

    Source: Zhang et al. 2024 (The Hedgehog & the Porcupine), section 4.2, equation 4, for the
    cross entropy; LoLCATs for the output's error. Weights are made for `chunk` queries at a time
    and again in the backward pass, so that memory is linear in T.

    Args:
        teacher, student: T and P; no gradient goes into the teacher.
        teacher_values, student_values: v' and v, (B, T, H, V).
        segments: int (B, T) document numbers or None.
        chunk: C.

    Returns:
        In nats: xent, kl, mse, teacher_entropy, student_entropy (0-dim, float32 or float64). The
        first three have gradients.
    """
    T = teacher_values.shape[1]
    exact = accumulation_dtype(teacher_values, student_values)

    def sums(start: int, teacher_values: Tensor, student_values: Tensor) -> Tensor:
        rows = slice(start, min(start + chunk, T))
        with torch.no_grad():
            imitated = teacher(rows).to(exact)
            goal = _read(imitated, teacher_values.to(exact))
        weights = student(rows).to(exact)
        error = (_read(weights, student_values.to(exact)) - goal).square().mean(-1)
        each = [
            -(imitated * weights.clamp(min=SMALLEST_WEIGHT).log()).sum(-1),
            error.transpose(1, 2),
            _entropy(imitated),
            _entropy(weights.detach()),
        ]
        if segments is not None:
            valid = (segments[:, rows] >= 0)[:, None]
            each = [x.where(valid, 0) for x in each]
        return torch.stack([x.sum() for x in each])

    total = torch.zeros(4, dtype=exact, device=teacher_values.device)
    with torch.autocast(teacher_values.device.type, enabled=False):
        for start in range(0, T, chunk):
            total = total + checkpoint(
                sums,
                start,
                teacher_values,
                student_values,
                use_reentrant=False,
                preserve_rng_state=False,
            )
    tokens = teacher_values[..., 0, 0].numel() if segments is None else (segments >= 0).sum()
    xent, mse, teacher_entropy, student_entropy = total / (tokens * teacher_values.shape[2])
    return {
        "xent": xent,
        "kl": xent - teacher_entropy,
        "mse": mse,
        "teacher_entropy": teacher_entropy.detach(),
        "student_entropy": student_entropy.detach(),
    }


def softmax_rows(q: Tensor, k: Tensor, *, segments: Tensor | None = None) -> Rows:
    """Causal softmax attention of q, k (B, T, H, D), scaled by D^-0.5."""
    exact = accumulation_dtype(q, k)
    scale = q.shape[3] ** -0.5

    def rows(at: slice) -> Tensor:
        scores = _products(q[:, at].to(exact) * scale, k[:, : at.stop].to(exact))
        return scores.masked_fill(~_past(at, segments, q.device), float("-inf")).softmax(-1)

    return rows


def feature_rows(
    phi_q: Tensor, phi_k: Tensor, *, eps: float, segments: Tensor | None = None
) -> Rows:
    """Causal linear attention of features phi_q, phi_k (B, T, H, F)."""

    def rows(at: slice) -> Tensor:
        weights = _products(phi_q[:, at], phi_k[:, : at.stop])
        weights = weights.masked_fill(~_past(at, segments, phi_q.device), 0)
        return weights / (weights.sum(-1, keepdim=True) + eps)

    return rows


def window_rows(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    window_weight: Tensor | float,
    linear_weight: Tensor | float,
    eps: float,
    segments: Tensor | None = None,
) -> Rows:
    """The weights of kernels.window_linear_attention, of which q, k and the features are."""
    exact = accumulation_dtype(q, k)
    scale = q.shape[3] ** -0.5
    g, a = (
        weight.to(exact)[:, None, None] if isinstance(weight, Tensor) else weight
        for weight in (window_weight, linear_weight)
    )

    def rows(at: slice) -> Tensor:
        past = _past(at, segments, q.device)
        near = past & _within(window, at, segments, q.device)
        scores = _products(q[:, at].to(exact) * scale, k[:, : at.stop].to(exact))
        scores = scores.masked_fill(~near, float("-inf"))
        largest = scores.amax(-1, keepdim=True) if window else 0.0
        far = _products(phi_q[:, at].to(exact), phi_k[:, : at.stop].to(exact))
        weights = g * (scores - largest).exp() + a * far.masked_fill(near | ~past, 0)
        return weights / (weights.sum(-1, keepdim=True) + eps)

    return rows


def _rows_of(weights: Tensor) -> Rows:
    return lambda at: weights[:, :, at, : at.stop]


def _products(q: Tensor, k: Tensor) -> Tensor:
    """(B, C, H, F) and (B, E, H, F) -> (B, H, C, E)."""
    return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


def _read(weights: Tensor, values: Tensor) -> Tensor:
    """(B, H, C, E) times the first E of (B, T, H, V) -> (B, C, H, V)."""
    return (weights @ values[:, : weights.shape[3]].transpose(1, 2)).transpose(1, 2)


def _past(at: slice, segments: Tensor | None, device: torch.device) -> Tensor:
    """bool, (C, E) or (B, 1, C, E): the key is no later than the query, and of its document."""
    mask = torch.ones(at.stop - at.start, at.stop, dtype=torch.bool, device=device).tril(at.start)
    if segments is None:
        return mask
    return (mask & (segments[:, at, None] == segments[:, None, : at.stop]))[:, None]


def _within(window: int, at: slice, segments: Tensor | None, device: torch.device) -> Tensor:
    """bool, (C, E) or (B, 1, C, E): the key is one of the newest `window` up to the query."""
    if segments is None:
        place = torch.arange(at.stop, device=device)
        return place[at, None] - place < window
    place = (segments >= 0).cumsum(1)  # padding takes no place in the window
    return (place[:, at, None] - place[:, None, : at.stop] < window)[:, None]


def _entropy(weights: Tensor) -> Tensor:
    return -torch.xlogy(weights, weights).sum(-1)
