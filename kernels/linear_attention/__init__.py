"""Causal linear attention over feature vectors (Katharopoulos et al. 2020)."""

from functools import partial

from torch import Tensor

from kernels.checks import check_floating, check_not_empty, check_segments, check_shape
from kernels.dispatch import choose
from kernels.linear_attention.features import (
    SMALLEST_FEATURE,
    MapName,
    check_map,
    features,
    num_features,
)
from kernels.linear_attention.flops import CHUNK, linear_attention_flops
from kernels.linear_attention.op import linear_attention_op, step_at_once
from kernels.linear_attention.reference import State, linear_attention_reference
from kernels.precision import accumulation_dtype

__all__ = [
    "CHUNK",
    "SMALLEST_FEATURE",
    "MapName",
    "State",
    "features",
    "linear_attention",
    "linear_attention_flops",
    "num_features",
]

_FORMS = {
    "triton": partial(linear_attention_op, form="triton"),
    "auto": partial(linear_attention_op, form="auto"),
    "cpp": partial(linear_attention_op, form="cpp"),
    "torch": linear_attention_op,
    "reference": linear_attention_reference,
}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: State | None = None,
    return_state: bool = False,
    segments: Tensor | None = None,
    feature_map: MapName | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Causal linear attention, in chunks, in time and memory linear in T.

        S_t = S_{t-1} + k_t v_t^T,  z_t = z_{t-1} + k_t,  y_t = q_t S_t / (q_t.z_t + eps)

    with q already multiplied by `scale`, and y_t = q_t S_t where `normalize` is False.
    Source: Katharopoulos et al. 2020 (Transformers are RNNs), equations 10-12, for the
    recurrence; states and sums over chunks are float32 (float64 for float64 inputs) whatever the
    inputs, products inside a chunk 16-bit where the inputs are and the machine is good at it.

    Args:
        q, k: (B, T, H, K), after the feature map. Normalised outputs want features >= 0. With
            `feature_map`: (B, T, H, X), what the map makes K features of.
        v: (B, T, H, V).
        scale: of q; it cancels under `normalize` but for eps.
        normalize: divide by the sum of the weights.
        eps: added to that sum.
        initial_state: (S (B, H, K, V), z (B, H, K)), what an earlier call returned; it belongs to
            the first valid document of each row. None is the empty past.
        return_state: return (y, state after the last token) and not y alone.
        segments: int (B, T) document numbers, non-decreasing over the valid positions; S and z
            start at zero in each document. -1 is padding: it leaves the state alone, and its
            output is finite and otherwise unspecified.
        feature_map: "hedgehog", "taylor" or "taylor_compressed", see features.features: of q and k,
            rounded to the dtype of v. Triton's kernels make the features of each tile as they load
            it, so that none reach memory, for X up to 64; so does "cpp" on a CPU with AMX, of
            Hedgehog's map and bfloat16 v. Other forms, wider inputs and single tokens have them
            made in front.
        backend: "triton", "cpp" (on the CPU; compiled on first use, see kernels.native), "torch",
            "reference", or "auto": "triton" on a GPU, on a CPU "cpp" where there is a compiler,
            which multiplies bfloat16 in tiles where the CPU has AMX.

    Returns:
        y (B, T, H, V) in the dtype of v, and the state of each row's last valid document in
        float32 (a row of padding returns its initial state), if asked for.

    Raises:
        ValueError: shapes or dtypes do not fit, T = 0, or an unknown map.
        BackendError: no such backend, or "cpp" without a compiler or off the CPU.
    """
    plain = segments is None and feature_map is None and backend in ("auto", "cpp")
    if plain and initial_state is not None:
        step = step_at_once(q, k, v, initial_state, scale, normalize, eps)
        if step is not None:
            return step if return_state else step[0]
    check_map(feature_map)
    _check(q, k, v, initial_state, segments, feature_map)
    form = choose("linear_attention", backend, _FORMS, q.device, accumulation_dtype(q, k, v))
    y, state = form(
        q,
        k,
        v,
        scale=scale,
        normalize=normalize,
        eps=eps,
        initial_state=initial_state,
        segments=segments,
        return_state=return_state,
        feature_map=feature_map,
    )
    return (y, state) if return_state else y


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None,
    segments: Tensor | None,
    feature_map: MapName | None,
) -> None:
    check_floating("linear_attention", q=q, k=k, v=v)
    check_shape("linear_attention", "q", q, "(B, T, H, K)", None, None, None, None)
    B, T, H, K = q.shape
    check_not_empty("linear_attention", "q", q, 1)
    check_shape("linear_attention", "k", k, "(B, T, H, K)", B, T, H, K)
    check_shape("linear_attention", "v", v, "(B, T, H, V)", B, T, H, None)
    if initial_state is not None:
        S, z = initial_state
        K = num_features(K, feature_map)
        check_shape("linear_attention", "initial_state[0]", S, "(B, H, K, V)", B, H, K, v.shape[3])
        check_shape("linear_attention", "initial_state[1]", z, "(B, H, K)", B, H, K)
    check_segments("linear_attention", segments, B, T)
