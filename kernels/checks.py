"""Argument checks of the operators: one line naming the argument, its value and what fits."""

import torch
from torch import Tensor


def check_shape(operator: str, name: str, tensor: Tensor, letters: str, *sizes: int | None) -> None:
    """Raise ValueError unless `tensor` has the shape `sizes`; None stands for any size.

    Args:
        letters: the expected shape as the docstring writes it, for instance "(B, T, H, K)".
    """
    shape = tensor.shape
    if shape == sizes:  # compared at once: a decoding step is checked in microseconds
        return
    if len(shape) == len(sizes):
        for size, wanted in zip(shape, sizes, strict=True):
            if wanted is not None and size != wanted:
                break
        else:
            return
    wanted_text = ", ".join("*" if size is None else str(size) for size in sizes)
    raise ValueError(
        f"{operator}: {name} has shape {tuple(shape)}; expected {letters} = ({wanted_text})"
    )


def check_floating(operator: str, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor is of a real floating-point type."""
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{operator}: {name} is {tensor.dtype}; expected a floating-point dtype"
            )


def check_not_empty(operator: str, name: str, tensor: Tensor, dim: int) -> None:
    """Raise ValueError when `tensor` has no position along its time dimension `dim`."""
    if tensor.shape[dim] == 0:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}; "
            f"dimension {dim} is time and must be at least 1"
        )


def check_segments(operator: str, segments: Tensor | None, batch: int, length: int) -> None:
    """Raise ValueError unless `segments` is None or an integer tensor (B, T)."""
    if segments is None:
        return
    check_shape(operator, "segments", segments, "(B, T)", batch, length)
    check_integer(operator, segments=segments)


def check_integer(operator: str, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor holds integers."""
    for name, tensor in tensors.items():
        if tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
            raise ValueError(f"{operator}: {name} is {tensor.dtype}; expected an integer dtype")
