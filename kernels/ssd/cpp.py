"""SSD in C++ (chunks.cpp): what it is told, and what becomes of its results.

B batch, L time, H heads, P width per head, N state, G groups.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.native import DTYPES
from kernels.ssd.chunked import Gradients
from kernels.ssd.spans import Arguments

SOURCE = Path(__file__).with_name("chunks.cpp")
ONE_THREAD = 1 << 20  # multiply-adds, about, from which on a second thread is worth its start
_MOST_HEADS = 4  # of a block: the products of B and C are made once for all of them
_BLOCKS = 8  # that there should be in all, to keep some threads busy


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "time")),
    )


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class _Problem(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "batch", "length", "heads", "groups", "width", "states"),
        *_fields(ctypes.c_int64, "chunk", "block", "dtype", "threads"),
        *_fields(ctypes.c_int64, "normalize", "state_down", "state_along"),
        *_fields(ctypes.c_double, "scale", "eps"),
        *_fields(_Tokens, "x", "z", "B", "C", "y"),
        *_fields(ctypes.c_void_p, "dt", "log_decay", "D", "initial", "documents", "last", "kept"),
        *_fields(ctypes.c_void_p, "sums"),
        *_fields(_Tokens, "grad_y", "dx", "dz"),
        *_fields(ctypes.c_void_p, "grad_last", "d_dt", "d_log_decay", "d_initial"),
        *_fields(ctypes.c_void_p, "parts_D", "parts_B", "parts_C"),
    )


def forward(
    library: ctypes.CDLL, args: Arguments, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As chunked.forward."""
    (batch, length, H, P), (G, N) = args.x.shape, args.B.shape[2:]
    call = _call(library, args)
    y = call.tokens("y", torch.empty(args.x.shape, dtype=call.stored))
    last = call.sums("last", torch.empty(batch, H, P, N, dtype=args.dtype))
    kept = last.new_empty(0)
    if keep_states:
        chunks = -(-length // args.chunk_size)
        kept = call.sums("kept", last.new_empty(batch, chunks, G, N, H // G * P))
    call.run("forward")
    return y.to(args.x.dtype), last, kept


def backward(
    library: ctypes.CDLL, args: Arguments, kept: Tensor, grad_y: Tensor, grad_last: Tensor
) -> Gradients:
    """As chunked.backward."""
    (batch, length, H, P), (G, N) = args.x.shape, args.B.shape[2:]
    call = _call(library, args)
    call.tokens("grad_y", grad_y)
    dx = call.tokens("dx", torch.empty(args.x.shape, dtype=call.stored))
    dz = torch.empty(0, dtype=args.x.dtype)
    if args.z is not None:
        dz = call.tokens("dz", torch.empty(args.x.shape, dtype=call.stored))
    call.sums("kept", kept)
    call.sums("grad_last", grad_last)
    room = kept.new_empty
    d_dt = call.sums("d_dt", room(batch, length, H))
    d_log_decay = call.sums("d_log_decay", room(batch, length, H))
    d_initial = call.sums("d_initial", room(batch, H, P, N))
    parts_D = call.sums("parts_D", room(batch, H, P))
    blocks = -(-(H // G) // call.problem.block)
    parts = {n: call.sums(f"parts_{n}", room(blocks, batch, length, G, N)) for n in ("B", "C")}
    call.run("backward")
    call.held.clear()  # what has been used up goes before there is more
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


class Call:
    """A problem of chunks.cpp, and the tensors that it points to, which live as long.

    Args:
        stored: the dtype of x, z, B, C, y and their gradients.
        exact: the dtype of sums.
        sizes: numbers of the problem, by name.
    """

    def __init__(
        self, library: ctypes.CDLL, stored: torch.dtype, exact: torch.dtype, **sizes: float
    ) -> None:
        self.library, self.stored, self.exact = library, stored, exact
        self.held: list[Tensor] = []
        self.problem = _Problem(**sizes)
        self.problem.dtype = DTYPES.index(stored)
        size = self.problem
        width = size.width + size.states
        work = size.batch * size.length * size.heads * width * (size.chunk + size.states)
        size.threads = 1 if work < ONE_THREAD else torch.get_num_threads()

    def tokens(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor (B, L, heads or groups, width) in the dtype of x."""
        tensor = tensor.to(self.stored)
        if tensor.stride()[2:] != (tensor.shape[3], 1):
            tensor = tensor.contiguous()
        described = _Tokens(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
        setattr(self.problem, name, described)
        self.held.append(tensor)
        return tensor

    def sums(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that is to be contiguous, in the dtype of sums."""
        return self._point(name, tensor.to(self.exact).contiguous())

    def documents(self, tensor: Tensor) -> None:
        """Their numbers, int64 (B, L)."""
        self._point("documents", tensor.contiguous())

    def run(self, function: str) -> None:
        """Call a function of the library."""
        getattr(self.library, function)(ctypes.byref(self.problem))

    def _point(self, name: str, tensor: Tensor) -> Tensor:
        setattr(self.problem, name, tensor.data_ptr())
        self.held.append(tensor)
        return tensor


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
    same = all(x.dtype == args.x.dtype for x in given) and args.x.dtype in DTYPES
    call = Call(
        library,
        args.x.dtype if same else args.dtype,
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
        call.documents(args.documents)
    return call
