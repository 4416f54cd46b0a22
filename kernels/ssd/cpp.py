"""SSD in C++ (chunks.cpp): what it is told, and what becomes of its results.

B batch, L time, H heads, P width per head, N state, G groups.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.native import Tokens, fields, stored_dtype
from kernels.ssd.chunked import Gradients
from kernels.ssd.spans import Arguments

SOURCE = Path(__file__).with_name("chunks.cpp")
_MOST_HEADS = 4  # of a block: the products of B and C are made once for all of them
_BLOCKS = 8  # that there should be in all, to keep some threads busy


class _Problem(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_int64, "batch", "length", "heads", "groups", "width", "states"),
        *fields(ctypes.c_int64, "chunk", "block", "dtype", "threads"),
        *fields(ctypes.c_int64, "normalize", "state_down", "state_along"),
        *fields(ctypes.c_double, "scale", "eps"),
        *fields(Tokens, "x", "z", "B", "C", "y"),
        *fields(ctypes.c_void_p, "dt", "log_decay", "D", "initial", "documents", "last", "kept"),
        *fields(ctypes.c_void_p, "sums"),
        *fields(Tokens, "grad_y", "dx", "dz"),
        *fields(ctypes.c_void_p, "grad_last", "d_dt", "d_log_decay", "d_initial"),
        *fields(ctypes.c_void_p, "parts_D", "parts_B", "parts_C"),
    )


def forward(
    library: ctypes.CDLL, args: Arguments, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As chunked.forward."""
    (batch, length, H, P), (G, N) = args.x.shape, args.B.shape[2:]
    call = _call(library, args)
    y = call.new_tokens("y", *args.x.shape)
    last = call.new_sums("last", batch, H, P, N)
    kept = last.new_empty(0)
    if keep_states:
        kept = call.new_sums("kept", batch, -(-length // args.chunk_size), G, N, H // G * P)
    call.run("forward")
    return y.to(args.x.dtype), last, kept


def backward(
    library: ctypes.CDLL, args: Arguments, kept: Tensor, grad_y: Tensor, grad_last: Tensor
) -> Gradients:
    """As chunked.backward."""
    (batch, length, H, P), (G, N) = args.x.shape, args.B.shape[2:]
    call = _call(library, args)
    call.tokens("grad_y", grad_y)
    dx = call.new_tokens("dx", *args.x.shape)
    dz = torch.empty(0, dtype=args.x.dtype)
    if args.z is not None:
        dz = call.new_tokens("dz", *args.x.shape)
    call.sums("kept", kept)
    call.sums("grad_last", grad_last)
    d_dt = call.new_sums("d_dt", batch, length, H)
    d_log_decay = call.new_sums("d_log_decay", batch, length, H)
    d_initial = call.new_sums("d_initial", batch, H, P, N)
    parts_D = call.new_sums("parts_D", batch, H, P)
    blocks = -(-(H // G) // call.problem.block)
    parts = {n: call.new_sums(f"parts_{n}", blocks, batch, length, G, N) for n in ("B", "C")}
    call.run("backward")
    call.forget()  # what has been used up goes before there is more
    d_B, d_C = (_sum(parts.pop(name)) for name in ("B", "C"))
    return Gradients(
        x=dx.to(args.x.dtype),
        dt=d_dt,
        log_decay=d_log_decay,
        B=d_B.to(args.B.dtype),
        C=d_C.to(args.C.dtype),
        D=parts_D.sum(0),
        z=dz if args.z is None else dz.to(args.z.dtype),
        initial_states=d_initial,
    )


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


class Call(native.Call):
    """A problem of chunks.cpp.

    Args:
        stored: the dtype of x, z, B, C, y and their gradients.
        exact: the dtype of sums.
        sizes: numbers of the problem, by name.
    """

    problem: _Problem

    def __init__(
        self, library: ctypes.CDLL, stored: torch.dtype, exact: torch.dtype, **sizes: float
    ) -> None:
        self.stored, self.exact = stored, exact
        problem = _Problem(**sizes, dtype=native.DTYPES.index(stored))
        steps = problem.batch * problem.length * problem.heads
        each = (problem.width + problem.states) * (problem.chunk + problem.states)
        super().__init__(library, problem, work=steps * each)

    def tokens(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor (B, L, heads or groups, width) in the dtype of x."""
        return self.point_tokens(name, tensor, self.stored)

    def new_tokens(self, name: str, *shape: int) -> Tensor:
        """Room for a result (B, L, heads, width)."""
        return self.tokens(name, torch.empty(shape, dtype=self.stored))

    def sums(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of sums."""
        return self.point(name, tensor, self.exact)

    def new_sums(self, name: str, *shape: int) -> Tensor:
        """Room for a result in the dtype of sums."""
        return self.room(name, shape, self.exact)


def _heads_of_block(batch: int, heads: int, groups: int, width: int, states: int) -> int:
    """Heads of a group that are worked on together.

    By the shapes alone, so that sums do not depend on the number of threads. The gradients of B
    and C have a part for every block: all parts of one are to be no more than half of x.
    """
    wanted = min(_MOST_HEADS, max(1, batch * groups * heads // _BLOCKS), heads)
    most_blocks = max(1, heads * width // (2 * states))
    return max(wanted, -(-heads // most_blocks))


def _call(library: ctypes.CDLL, args: Arguments) -> Call:
    (batch, length, H, P), (G, N) = args.x.shape, args.B.shape[2:]
    given = [x for x in (args.x, args.B, args.C, args.z) if x is not None]
    call = Call(
        library,
        stored_dtype(args.dtype, *given),
        args.dtype,
        batch=batch,
        length=length,
        heads=H,
        groups=G,
        width=P,
        states=N,
        chunk=min(args.chunk_size, length),
        block=_heads_of_block(batch, H // G, G, P, N),
        state_down=N,
        state_along=1,
        scale=1,
    )
    for name in ("x", "z", "B", "C"):
        tensor = getattr(args, name)
        if tensor is not None:
            call.tokens(name, tensor)
    call.sums("dt", args.dt)
    call.sums("log_decay", args.log_decay)
    if args.D is not None:
        call.sums("D", args.D.to(args.dtype).view(H, -1).expand(H, P))
    if args.initial_states is not None:
        call.sums("initial", args.initial_states)
    if args.documents is not None:
        call.point("documents", args.documents, torch.int64)
    return call
