"""The softmax of the chunked loss in C++ (rows.cpp): what it is told.

c tokens, V vocabulary.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.native import DTYPES, Call, fields, stored_dtype

SOURCE = Path(__file__).with_name("rows.cpp")


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "rows", "width", "dtype", "gradient", "threads"),
        *fields(ctypes.c_double, "share"),
        *fields(ctypes.c_void_p, "logits", "targets", "losses"),
    )


def softmax_rows(
    library: ctypes.CDLL,
    logits: Tensor,
    targets: Tensor,
    exact: torch.dtype,
    share: float | None,
) -> tuple[Tensor, Tensor]:
    """As chunked.softmax_rows; the gradient takes the place of the logits, in their dtype."""
    (c, V), stored = logits.shape, stored_dtype(exact, logits)
    wanted = share is not None
    problem = _Problem(c, V, DTYPES.index(stored), wanted, share=share or 0.0)
    call = Call(library, problem, work=16 * c * V)
    logits = call.point("logits", logits, stored)
    call.point("targets", targets, torch.int64)
    losses = call.room("losses", (c,), exact)
    call.run("softmax_rows")
    return losses, logits if wanted else logits.new_empty(0)
