"""Linear attention whose first positions are read by all (JRT-RNN; Arora et al. 2024)."""

from functools import partial

from torch import Tensor

from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.linear_attention.reference import State
from kernels.precision import accumulation_dtype
from kernels.prefix_linear_attention.chunked import prefix_linear_attention_op, prefix_sums
from kernels.prefix_linear_attention.reference import prefix_linear_attention_reference

__all__ = ["prefix_linear_attention", "prefix_sums"]

_FORMS = {
    "triton": partial(prefix_linear_attention_op, form="triton"),
    "auto": partial(prefix_linear_attention_op, form="auto"),
    "cpp": partial(prefix_linear_attention_op, form="cpp"),
    "torch": prefix_linear_attention_op,
    "reference": prefix_linear_attention_reference,
}


def prefix_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    *,
    eps: float = 1e-12,
    return_state: bool = False,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Causal linear attention plus a sum over the prefix that every position reads.

        y_t = (q_t S_t) / (q_t.z_t + eps)
        S_t = sum_{j <= t} k_j v_j^T + sum_{j < M} k'_j v'_j^T,  z_t likewise without the values

    One denominator for both sums. Positions inside the prefix see all of it, later ones too;
    decoding goes on from the returned state with `linear_attention`.
    Source: "Just read twice" (Arora et al. 2024), section 4.2.

    Args:
        q, k: (B, T, H, K), after the feature map.
        v: (B, T, H, V).
        k_prefix, v_prefix: (B, M, H, K) and (B, M, H, V), of positions 0..M-1; M may be 0. A row
            with a shorter prefix has zeros in k_prefix beyond its end.
        eps: added to the sum of the weights.
        return_state: return (y, state) and not y alone.
        segments: int (B, T) document numbers as in `linear_attention`; the prefix belongs to the
            first valid document of each row.
        backend: "triton", "cpp" (on the CPU), "torch", "reference", or "auto": "triton" on a GPU,
            else as linear_attention's.

    Returns:
        y (B, T, H, V) in the dtype of v, and (S (B, H, K, V), z (B, H, K)) in float32 (float64
        for float64 inputs) if asked for.

    Raises:
        ValueError: shapes or dtypes do not fit, T = 0, or M > T.
        BackendError: no such backend.
    """
    name = "prefix_linear_attention"
    check_floating(name, q=q, k=k, v=v, k_prefix=k_prefix, v_prefix=v_prefix)
    check_shape(name, "q", q, "(B, T, H, K)", None, None, None, None)
    B, T, H, K = q.shape
    check_not_empty(name, "q", q, 1)
    check_shape(name, "k", k, "(B, T, H, K)", B, T, H, K)
    check_shape(name, "v", v, "(B, T, H, V)", B, T, H, None)
    check_shape(name, "k_prefix", k_prefix, "(B, M, H, K)", B, None, H, K)
    M = k_prefix.shape[1]
    check_shape(name, "v_prefix", v_prefix, "(B, M, H, V)", B, M, H, v.shape[3])
    if M > T:
        raise ValueError(f"{name}: k_prefix has {M} positions; expected at most q's {T}")
    check_segments(name, segments, B, T)
    form = choose(name, backend, _FORMS, q.device, accumulation_dtype(q, k, v))
    y, state = form(q, k, v, k_prefix, v_prefix, eps=eps, segments=segments)
    return (y, state) if return_state else y
