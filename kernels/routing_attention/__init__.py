"""Routing attention: softmax attention inside clusters of similar tokens (Roy et al. 2021)."""

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.checks import (
    check_floating,
    check_integer,
    check_not_empty,
    check_segments,
    check_shape,
)
from kernels.dispatch import choose
from kernels.precision import accumulation_dtype
from kernels.routing_attention.assignment import nearest, similarities, unit
from kernels.routing_attention.balanced import Members, balanced_torch
from kernels.routing_attention.flops import (
    balanced_attention_flops,
    cluster_attention_flops,
    similarity_flops,
)
from kernels.routing_attention.op import cluster_torch
from kernels.routing_attention.reference import balanced_reference, cluster_reference

__all__ = [
    "Members",
    "SelfRule",
    "balanced_attention",
    "balanced_attention_flops",
    "cluster_attention",
    "cluster_attention_flops",
    "nearest",
    "routing_attention",
    "similarities",
    "similarity_flops",
    "unit",
]

Mode = Literal["strict", "topw"]
SelfRule = Literal["allowed", "last_resort"]

_CLUSTER_FORMS = {
    "triton": partial(cluster_torch, form="triton"),
    "auto": partial(cluster_torch, form="auto"),
    "cpp": partial(cluster_torch, form="cpp"),
    "torch": cluster_torch,
    "reference": cluster_reference,
}
_BALANCED_FORMS = {
    "triton": partial(balanced_torch, form="triton"),
    "auto": partial(balanced_torch, form="auto"),
    "cpp": partial(balanced_torch, form="cpp"),
    "torch": balanced_torch,
    "reference": balanced_reference,
}


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    window: int,
    mode: Mode = "strict",
    causal: bool = True,
    self_rule: SelfRule = "allowed",
    normalize_keys: bool = False,
    scale: float | None = None,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside clusters, in time and memory T * window, never T * T.

    A vector's cluster is that of the nearest centroid by angle; queries and keys are labelled
    each by itself. Nothing is differentiated through labels or centroids.

    mode="strict": position i attends to the last `window` positions j <= i whose key has the
    label of query i, and to itself. What i sees is fixed by positions 0..i alone.

    mode="topw", the published form (Roy et al. 2021, section 4.1): cluster c holds the `window`
    positions of a document nearest to centroid c (the earliest among equals), once for the queries
    and once for the keys; its queries attend to its keys (j <= i where causal), and a position's
    outputs are averaged over the clusters that hold it. One that no cluster holds gives zeros.
    It sees the future even where `causal`: a later position can push an earlier one out of a
    cluster, and no mask can repair that.

    Differs from the paper's code in the mean, which has no eps, and in the causal mask, which
    compares positions where theirs compares ranks; and in the vectors that are attended with,
    which are as given (see `normalize_keys`) and not layer-normed.

    Args:
        q, k, v: (B, T, H, D). Shared queries and keys pass k=q and normalize_keys=True.
        centroids: (H, K, D), of unit length.
        window: how many positions a query sees (strict) or a cluster holds (topw).
        mode: "strict" or "topw".
        causal: False: strict also sees the first `window` positions j >= i of its label; topw
            sees its whole cluster.
        self_rule: "allowed": a position's own key is one like any other; under "strict" it is
            seen whatever its label. "last_resort": it is seen only where nothing else is.
        normalize_keys: attend to k / |k|; labels never depend on a length.
        scale: of the scores before the softmax; D^-0.5 by default.
        segments: int (B, T) document numbers, non-decreasing over the valid positions; windows and
            clusters are those of a document. -1 is padding: seen by no valid query, its own output
            finite and otherwise unspecified.
        backend: "triton", "cpp" (on the CPU; compiled on first use, see kernels.native), "torch",
            "reference", or "auto": "triton" on a GPU, on a CPU "cpp" where there is a compiler.

    Returns:
        (B, T, H, D) in the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not fit, T = 0, or an option out of its range.
        BackendError: no such backend, or "cpp" without a compiler or off the CPU.
    """
    _check("routing_attention", q, k, v, window, self_rule, segments)
    check_shape("routing_attention", "k", k, "(B, T, H, D)", *q.shape)
    _, _, H, D = q.shape
    check_floating("routing_attention", centroids=centroids)
    check_shape("routing_attention", "centroids", centroids, "(H, K, D)", H, None, D)
    check_not_empty("routing_attention", "centroids", centroids, 1)
    if mode not in get_args(Mode):
        raise ValueError(f"routing_attention: mode={mode!r}; allowed: 'strict', 'topw'")
    key = unit(k).to(k.dtype) if normalize_keys else k
    if mode == "strict":
        k_labels = nearest(k, centroids)
        q_labels = None if k is q else nearest(q, centroids)
        return cluster_attention(
            q,
            key,
            v,
            q_labels,
            k_labels,
            num_clusters=centroids.shape[1],
            window=window,
            causal=causal,
            self_rule=self_rule,
            scale=scale,
            segments=segments,
            backend=backend,
        )
    y, *_ = balanced_attention(
        q,
        key,
        v,
        None if k is q else similarities(q, centroids),
        similarities(k, centroids),
        window=window,
        causal=causal,
        self_rule=self_rule,
        scale=scale,
        segments=segments,
        backend=backend,
    )
    return y


def cluster_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_labels: Tensor | None,
    k_labels: Tensor,
    *,
    num_clusters: int,
    window: int,
    causal: bool = True,
    self_rule: SelfRule = "allowed",
    scale: float | None = None,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`routing_attention` in strict mode for given labels, and for keys from a past.

    Keys may be more than queries: the queries then are the LAST T of the S positions, which is
    decoding with a buffer. Only keys of one label need to stand in the order of time.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, H, D) with S >= T.
        q_labels: int (B, T, H), 0 to num_clusters - 1; None: those of the own keys.
        k_labels: int (B, S, H); -1 marks a key that is not there, such as an empty slot.
        num_clusters: K.
        segments: int (B, S), of the keys' positions.
        Others: see `routing_attention`.
    """
    _check("cluster_attention", q, k, v, window, self_rule, segments)
    (B, T, H, D), S = q.shape, k.shape[1]
    check_shape("cluster_attention", "k_labels", k_labels, "(B, S, H)", B, S, H)
    shared = q_labels is None
    if q_labels is None:
        q_labels = k_labels[:, S - T :]
    check_shape("cluster_attention", "q_labels", q_labels, "(B, T, H)", B, T, H)
    check_integer("cluster_attention", q_labels=q_labels, k_labels=k_labels)
    q_groups, k_groups = q_labels.long(), k_labels.long()  # which are multiplied by lengths
    if segments is not None:
        segments = segments.long()
        k_groups = _groups(k_groups, segments, num_clusters)
        q_groups = _groups(q_groups, segments[:, S - T :], num_clusters)
    form = choose(
        "cluster_attention", backend, _CLUSTER_FORMS, q.device, accumulation_dtype(q, k, v)
    )
    return form(
        q,
        k,
        v,
        q_groups,
        k_groups,
        window=window,
        causal=causal,
        last_resort=self_rule == "last_resort",
        shared=shared,
        scale=D**-0.5 if scale is None else scale,
    )


def balanced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scores: Tensor | None,
    k_scores: Tensor,
    *,
    window: int,
    causal: bool = True,
    self_rule: SelfRule = "allowed",
    scale: float | None = None,
    segments: Tensor | None = None,
    past: Members | None = None,
    filled: Tensor | None = None,
    want_members: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Members | None]:
    """`routing_attention` in top-w mode for given scores, and going on from a past.

    Members of the past compete with the new positions; what a cluster does not hold any more
    never comes back. One token at a time this is the decoding of Roy et al.: the clusters of a
    prefix, which are not those of the whole sequence.

    Args:
        q, k, v: (B, T, H, D).
        q_scores: (B, H, K, T), by which clusters choose their queries; None: as the keys.
        k_scores: (B, H, K, T).
        past: what an earlier call returned, for the first document of each row.
        filled: int (B,), slots of `past` in use.
        want_members: return what the clusters of each row's last document hold.
        Others: see `routing_attention`.

    Returns:
        y (B, T, H, D); int64 (B, T, H), the clusters that a position is the mean of; and the
        members, None unless asked for.
    """
    _check("balanced_attention", q, k, v, window, self_rule, segments)
    B, T, H, D = q.shape
    check_shape("balanced_attention", "k_scores", k_scores, "(B, H, K, T)", B, H, None, T)
    if q_scores is not None:
        check_shape("balanced_attention", "q_scores", q_scores, "(B, H, K, T)", *k_scores.shape)
    form = choose(
        "balanced_attention", backend, _BALANCED_FORMS, q.device, accumulation_dtype(q, k, v)
    )
    return form(
        q,
        k,
        v,
        q_scores,
        k_scores,
        window=window,
        causal=causal,
        last_resort=self_rule == "last_resort",
        scale=D**-0.5 if scale is None else scale,
        segments=segments,
        past=past,
        filled=filled,
        want_members=want_members,
    )


def _groups(labels: Tensor, segments: Tensor, num_clusters: int) -> Tensor:
    """One number for every cluster of every document, -1 for what is not there."""
    there = (labels >= 0) & (segments >= 0)[..., None]
    return torch.where(there, segments[..., None] * num_clusters + labels, -1)


def _check(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    self_rule: str,
    segments: Tensor | None,
) -> None:
    check_floating(operator, q=q, k=k, v=v)
    check_shape(operator, "q", q, "(B, T, H, D)", None, None, None, None)
    B, T, H, D = q.shape
    check_not_empty(operator, "q", q, 1)
    check_shape(operator, "k", k, "(B, S, H, D)", B, None, H, D)
    check_shape(operator, "v", v, "(B, S, H, D)", *k.shape)
    S = k.shape[1]
    if S < T:
        raise ValueError(f"{operator}: k has {S} positions; expected at least q's {T}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{operator}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype"
        )
    if window < 1:
        raise ValueError(f"{operator}: window={window}; expected at least 1")
    if self_rule not in get_args(SelfRule):
        raise ValueError(f"{operator}: self_rule={self_rule!r}; allowed: 'allowed', 'last_resort'")
    check_segments(operator, segments, B, S)
