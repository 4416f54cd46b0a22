"""The one place where a `backend=` argument is turned into an implementation."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels.launch import why_not_triton

BACKENDS = ("auto", "reference", "torch", "triton", "cpp")


class BackendError(RuntimeError):
    """A backend cannot serve a call; the message names the reason and the backends that can."""


def choose(
    operator: str,
    backend: str,
    forms: Mapping[str, Callable],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Callable:
    """Return the form of `operator` that serves `backend` on `device`.

    `forms` maps backend names to callables in the order in which "auto" prefers them. "auto" takes
    a Triton form on CUDA devices only; asked for by name it is interpreted on the CPU as well.

    Args:
        dtype: the widest of the inputs, which may rule a form out.

    Raises:
        BackendError: `backend` is unknown, or the operator has no form that can serve the call.
    """
    if backend == "auto" and device.type != "cuda":
        return next(form for name, form in forms.items() if name != "triton")
    not_triton = why_not_triton(device, dtype) if "triton" in forms else None
    usable = {n: f for n, f in forms.items() if n != "triton" or not_triton is None}
    if backend == "auto":
        return next(iter(usable.values()))
    if backend in usable:
        return usable[backend]
    if backend not in BACKENDS:
        reason = f"allowed: {', '.join(BACKENDS)}"
    elif backend in forms:
        reason = str(not_triton)
    else:
        reason = f"{operator} has no such form"
    raise BackendError(
        f"backend={backend!r} for {operator} on {device.type}: {reason}; "
        f"these can serve the call: {', '.join(usable)}"
    )


def observed() -> bool:
    """Whether a compiler or a dispatch mode, such as one that counts, is to see operators.

    Where none does, a few tokens are faster in plain torch than through an operator's own layer.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def implementation(package: str | None, form: str, auto: str = "") -> ModuleType:
    """The module `form` of an operator's package, imported when it is first needed.

    Triton is imported with the first kernel, so that the operators work without it.

    Args:
        auto: the module for the form "auto".
    """
    return import_module(f"{package}.{auto if form == 'auto' else form}")
