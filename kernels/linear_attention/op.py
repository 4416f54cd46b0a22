"""The chunked form and the steps as torch operators: seqmix::linear_attention*.

Being operators, they are counted by FlopCounterMode through their formulas and are not traced by
torch.compile. B batch, T time, H heads, K features, X the width that a feature map makes them from
(K without one), V value width, W = V plus the normaliser.
"""

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import implementation
from kernels.linear_attention import cpp, tiles
from kernels.linear_attention.features import MapName, features, fits_tiles, num_features
from kernels.linear_attention.flops import (
    linear_attention_backward_flops,
    linear_attention_flops,
)
from kernels.linear_attention.reference import State
from kernels.linear_attention.step import MOST_STEPS
from kernels.native import extension_for, extensions, in_hardware, library_for
from kernels.precision import accumulation_dtype
from kernels.segments import first_document, last_document

_STEPS = {"chunked": "step", "triton": "triton_step", "auto": "auto", "cpp": "cpp"}


def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    normalize: bool,
    eps: float,
    initial_state: State | None,
    segments: Tensor | None,
    return_state: bool,
    feature_map: MapName | None = None,
    form: str = "chunked",
) -> tuple[Tensor, State | None]:
    """The chunked form, or single steps for a few tokens with no gradient to keep.

    Triton's chunks make the features of their own tiles, and so do C++'s of 16-bit values, of
    Hedgehog's map; every other form is given them.

    Args:
        form: "chunked" or "triton", the module of this package that does the chunks; "cpp"; or
            "auto": C++ where kernels.native.library_for can build it.
    """
    S, z = initial_state or (None, None)
    few = q.shape[1] <= (MOST_STEPS if segments is None and form != "triton" else 1)
    few = few and not (torch.is_grad_enabled() and _any_requires_grad(q, k, v, S, z))
    if feature_map is not None and (few or not _makes_features(form, q, k, v, feature_map)):
        q, k = (features(x, feature_map).to(v.dtype) for x in (q, k))
        feature_map = None
    if few:
        padding = None if segments is None else segments < 0
        y, S, z = torch.ops.seqmix.linear_attention_steps(
            q, k, v, S, z, padding, scale, normalize, eps, _STEPS[form]
        )
        return y, (S, z)
    state = S
    if normalize and S is not None and z is not None:
        state = torch.cat([S, z[..., None].to(S.dtype)], dim=-1)
    y, state, _ = _chunked(q, k, v, state, segments, scale, normalize, eps, form, feature_map)
    if not return_state:
        return y, None
    if normalize:
        V = v.shape[3]
        return y, (state[..., :V].contiguous(), state[..., V].contiguous())
    keys = k if feature_map is None else features(k, feature_map).to(v.dtype)
    return y, (state, _key_sum(keys, z, segments, state.dtype))


def step_at_once(
    q: Tensor, k: Tensor, v: Tensor, state: State, scale: float, normalize: bool, eps: float
) -> tuple[Tensor, State] | None:
    """One token behind a state in C++, past every check and torch's dispatcher.

    A decoding step is over sooner than those are. None wherever they are needed: for what does not
    fit together, another device, a gradient, a subclass or transform of tensors, a mode, a profiler
    or a compiler that looks on, and until linear_attention_op has loaded the extension.
    """
    extension = extensions.get(cpp.SOURCE)
    if extension is None or torch.compiler.is_compiling():
        return None
    return extension.step(q, k, v, state, scale, normalize, eps)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _key_sum(k: Tensor, z: Tensor | None, segments: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of each row's last document's keys, (B, H, K)."""
    if segments is None:
        total = k.sum(1, dtype=dtype)
        return total if z is None else total + z
    last = last_document(segments)
    mine = (segments == last[:, None]) & (segments >= 0)
    total = (k * mine[:, :, None, None]).sum(1, dtype=dtype)
    if z is None:
        return total
    return total + torch.where((last == first_document(segments))[:, None, None], z, 0)


def _option(feature_map: str | None) -> dict[str, str]:
    """What a form is told of the map: some know none."""
    return {} if feature_map is None else {"feature_map": feature_map}


def _makes_features(form: str, q: Tensor, k: Tensor, v: Tensor, feature_map: MapName) -> bool:
    """Whether the form makes the features of its own tiles."""
    if form == "triton":
        return fits_tiles(q.shape[3])
    return tiles.serve(q, k, v, feature_map) and _has_tiles(form, q.device.type)


@torch.compiler.assume_constant_result  # a compiler is there, or it is not
def _has_tiles(form: str, device: str) -> bool:
    library = library_for("linear_attention", tiles.SOURCE, form, torch.device(device))
    return library is not None and in_hardware(library)


def _chunks_in_cpp(
    form: str, q: Tensor, k: Tensor, v: Tensor, feature_map: str | None
) -> tuple[ModuleType, ctypes.CDLL] | None:
    """The module that does chunks in C++ and its library; None where `form` is another."""
    in_tiles = tiles.serve(q, k, v, feature_map) and _has_tiles(form, q.device.type)
    module, source = (tiles, tiles.SOURCE) if in_tiles else (cpp, cpp.CHUNKS)
    library = library_for("linear_attention", source, form, q.device)
    return None if library is None else (module, library)


@custom_op("seqmix::linear_attention", mutates_args=())
def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    form: str = "chunked",
    feature_map: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (q, k, v, state, segments, scale, normalize, eps)
    options = _option(feature_map)
    if (found := _chunks_in_cpp(form, q, k, v, feature_map)) is not None:
        module, library = found
        return module.forward(library, *given, **options)
    return implementation(__package__, form, "chunked").forward(*given, **options)


@_chunked.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    form: str = "chunked",
    feature_map: MapName | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, X), V = q.shape, v.shape[3]
    K, exact = num_features(X, feature_map), accumulation_dtype(q, k, v)
    return (
        v.new_empty(B, T, H, V),
        q.new_empty(B, H, K, V + int(normalize), dtype=exact),
        q.new_empty(B, T, H, int(normalize), dtype=exact),
    )


@custom_op("seqmix::linear_attention_backward", mutates_args=())
def _backward(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    y: Tensor,
    sums: Tensor,
    scale: float,
    form: str = "chunked",
    feature_map: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (grad_y, grad_state, q, k, v, state, segments, y, sums, scale)
    options = _option(feature_map)
    if (found := _chunks_in_cpp(form, q, k, v, feature_map)) is not None:
        module, library = found
        return module.backward(library, *given, **options)
    return implementation(__package__, form, "chunked").backward(*given, **options)


@_backward.register_fake
def _(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    y: Tensor,
    sums: Tensor,
    scale: float,
    form: str = "chunked",
    feature_map: MapName | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, _, H, X), W = q.shape, v.shape[3] + sums.shape[3]
    first = q.new_empty(B, H, num_features(X, feature_map), W, dtype=sums.dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), first


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, state, segments, scale, _normalize, _eps, form, feature_map = inputs
    y, _, sums = output
    ctx.save_for_backward(q, k, v, state, segments, y, sums)
    ctx.scale, ctx.form, ctx.feature_map = scale, form, feature_map
    ctx.set_materialize_grads(False)  # an output that nobody used costs nothing


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, state, segments, y, sums = ctx.saved_tensors
    dq, dk, dv, d_state = _backward(
        grad_y, grad_state, q, k, v, state, segments, y, sums, ctx.scale, ctx.form, ctx.feature_map
    )
    d_state = None if state is None else d_state.to(state.dtype)
    return dq, dk, dv, d_state, None, None, None, None, None, None


_chunked.register_autograd(_differentiate, setup_context=_save)

# Registered by hand: custom_op's own layer takes longer than a step in C++.
_library = torch.library.Library("seqmix", "FRAGMENT")
_library.define(
    "linear_attention_steps(Tensor q, Tensor k, Tensor v, Tensor? S, Tensor? z, Tensor? padding, "
    "float scale, bool normalize, float eps, str form='step') -> (Tensor, Tensor, Tensor)"
)


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    padding: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    form: str = "step",
) -> tuple[Tensor, Tensor, Tensor]:
    extension = extension_for("linear_attention", cpp.SOURCE, form, q.device)
    module = implementation(__package__, form, "step") if extension is None else extension
    return module.steps(q, k, v, S, z, padding, scale, normalize, eps)


_library.impl("linear_attention_steps", _steps, "CompositeExplicitAutograd")


@torch.library.register_fake("seqmix::linear_attention_steps", lib=_library)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    padding: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    form: str = "step",
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[3]
    exact = accumulation_dtype(q, k, v)
    return (
        v.new_empty(B, T, H, V),
        q.new_empty(B, H, K, V, dtype=exact),
        q.new_empty(B, H, K, dtype=exact),
    )


Shape = Sequence[int]


@register_flop_formula(torch.ops.seqmix.linear_attention)
def _(
    q: Shape,
    k: Shape,
    v: Shape,
    state: Shape | None,
    segments: Shape | None,
    scale: float,
    normalize: bool,
    eps: float,
    form: str = "chunked",
    feature_map: MapName | None = None,
    out_shape: Any = None,
) -> int:
    (B, T, H, X), V = q, v[3]
    K = num_features(X, feature_map)
    return linear_attention_flops(B, T, H, K, V, normalize=normalize)


@register_flop_formula(torch.ops.seqmix.linear_attention_steps)
def _(
    q: Shape,
    k: Shape,
    v: Shape,
    S: Shape | None,
    z: Shape | None,
    padding: Shape | None,
    scale: float,
    normalize: bool,
    eps: float,
    form: str = "step",
    out_shape: Any = None,
) -> int:
    (B, T, H, K), V = q, v[3]
    return linear_attention_flops(B, T, H, K, V, normalize=normalize)


@register_flop_formula(torch.ops.seqmix.linear_attention_backward)
def _(
    grad_y: Shape | None,
    grad_state: Shape | None,
    q: Shape,
    k: Shape,
    v: Shape,
    state: Shape | None,
    segments: Shape | None,
    y: Shape,
    sums: Shape,
    scale: float,
    form: str = "chunked",
    feature_map: MapName | None = None,
    out_shape: Any = None,
) -> int:
    (B, T, H, X), V = q, v[3]
    K = num_features(X, feature_map)
    return linear_attention_backward_flops(B, T, H, K, V, normalize=sums[3] == 1)
