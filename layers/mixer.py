"""The contract that every sequence mixer keeps; tests/contract holds each of them to it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layers.report import Report
from layers.state import tensors


class Mixer(nn.Module, ABC):
    """A layer that moves information along the sequence: (B, T, D) -> (B, T, D).

    Class facts, checked when a class is defined:
        causal: "strict" (output t depends on inputs 0..t only), "prefix" (strict outside the
            region that `prefix_len` opens), or "leaky" (sees the future, as its paper has it).
        leak_reason: where a leaky mixer sees the future, in one line; empty for the others.
        supports_segments: whether `segments` may be given.
        state_type: the class of its state.
        time_exponent, memory_exponent: training time and memory grow no faster than these powers
            of the length, but for logarithms.
        bounded_state: whether the state's size is independent of the length seen. A mixer for
            which it depends on an option sets an instance attribute of the same name.
    """

    causal: ClassVar[Literal["strict", "prefix", "leaky"]] = "strict"
    leak_reason: ClassVar[str] = ""
    supports_segments: ClassVar[bool] = True
    state_type: ClassVar[type] = object
    time_exponent: ClassVar[float] = 1.0
    memory_exponent: ClassVar[float] = 1.0
    bounded_state: bool
    d_model: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.causal not in ("strict", "prefix", "leaky"):
            raise TypeError(
                f"{cls.__name__}.causal = {cls.causal!r}; allowed: 'strict', 'prefix', 'leaky'"
            )
        if (cls.causal == "leaky") != bool(cls.leak_reason):
            raise TypeError(
                f"{cls.__name__}: leak_reason belongs to causal = 'leaky' and to nothing else"
            )

    @abstractmethod
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
        """Mix `x` along time.

        Args:
            x: (B, T, D), any T from 1.
            state: what an earlier call returned, or None for the empty past.
            segments: int (B, T) document numbers, non-decreasing over the valid positions; a new
                number starts a new document: every state resets and positions restart at 0. -1 is
                padding, wherever it stands: the identity on every state, its output unspecified.
                None: every position belongs to the document the state ended in.
            prefix_len: int (B,), how many leading positions each row may read in both
                directions; only mixers with causal = "prefix" use it, and without a state only.
            want_state: return the state after the last position; False computes nothing extra.
            report: collects auxiliary losses and statistics; None computes none.

        Returns:
            y (B, T, D), and the state (None unless asked for).

        Raises:
            ValueError: what `check_input` refuses.
        """

    @abstractmethod
    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The empty past, with room for `max_len` positions where the state grows.

        `device` and `dtype`, of activations, are those of the parameters by default.
        """

    @abstractmethod
    def state_bytes(self, batch_size: int, length: int) -> int:
        """Bytes of the state after `length` positions, activations in the parameters' dtype."""

    @abstractmethod
    def flops(self, batch_size: int, length: int) -> int:
        """FLOPs of a forward pass from the empty past, as torch's FlopCounterMode counts them."""

    def check_input(self, x: Tensor, state: Any = None, segments: Tensor | None = None) -> None:
        """Refuse arguments of `forward` that do not fit; every mixer calls this first.

        Raises:
            ValueError: x is not (B, T, d_model) with T >= 1, `state` is of another mixer or
                batch, or `segments` is not integer (B, T).
        """
        name = type(self).__name__
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.d_model:
            raise ValueError(
                f"{name}: x has shape {tuple(x.shape)}; expected (B, T, {self.d_model}), T >= 1"
            )
        if state is not None:
            if not isinstance(state, self.state_type):
                raise ValueError(
                    f"{name}: state is of type {type(state).__name__}; "
                    f"expected {self.state_type.__name__} or None"
                )
            batch = next(tensors(state)).shape[0]
            if batch != x.shape[0]:
                raise ValueError(f"{name}: state has {batch} rows; expected x's {x.shape[0]}")
        if segments is not None and (
            segments.shape != x.shape[:2]
            or segments.is_floating_point()
            or segments.dtype == torch.bool
        ):
            raise ValueError(
                f"{name}: segments is {segments.dtype} {tuple(segments.shape)}; "
                f"expected integers {tuple(x.shape[:2])}"
            )
