"""The one place where a `backend=` argument is turned into an implementation."""

from collections.abc import Callable, Mapping

import torch

BACKENDS = ("auto", "reference", "torch", "triton", "cpp")


class BackendError(RuntimeError):
    """A backend cannot serve a call; the message names the reason and the backends that can."""


def choose(
    operator: str,
    backend: str,
    forms: Mapping[str, Callable],
    device: torch.device,
) -> Callable:
    """Return the form of `operator` that serves `backend` on `device`.

    `forms` maps backend names to callables in the order in which "auto" prefers them; the Triton
    form is preferred on CUDA devices only.

    Raises:
        BackendError: `backend` is unknown, or the operator has no such form for this device.
    """
    usable = {n: f for n, f in forms.items() if n != "triton" or device.type == "cuda"}
    if backend == "auto":
        return next(iter(usable.values()))
    if backend in forms:  # an explicit request is served as asked: the interpreter runs on the CPU
        return forms[backend]
    reason = (
        f"{operator} has no such form" if backend in BACKENDS else f"allowed: {', '.join(BACKENDS)}"
    )
    raise BackendError(
        f"backend={backend!r} for {operator} on {device.type}: {reason}; "
        f"these can serve the call: {', '.join(usable)}"
    )
