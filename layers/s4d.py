"""S4D: a diagonal state space per channel, as a convolution and as a recurrence.

B batch, T time, D channels, N state of a channel (N/2 complex numbers), c block of powers.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, pad

from kernels.long_conv import long_conv, long_conv_flops
from kernels.precision import outside_autocast
from kernels.segments import first_document, restarts
from layers.kv_cache import newest
from layers.marks import mark
from layers.mixer import Mixer
from layers.projection import Dense, Projection, projection_flops
from layers.report import Report
from layers.segments import NO_DOCUMENT, Continuation, belongs, join, keep_rows, positions


@dataclass(frozen=True, eq=False)
class S4DState:
    """What the state spaces remember of the document each row ended in."""

    h: Tensor  # (B, D, N/2) complex64 or complex128
    segment: Tensor  # (B,) int64 document that the row ended in


class System(NamedTuple):
    """The discrete systems, (D, N/2) complex: h_t = exp(log_a) h_{t-1} + b u_t, y = 2 Re(c h)."""

    log_a: Tensor
    b: Tensor
    c: Tensor


class S4D(Mixer):
    """S4D's state space layer, with the gated linear unit behind it.

        A = -exp(log_A_real) + i A_imag,    step = exp(log_dt)
        h_t = exp(step A) h_{t-1} + (exp(step A) - 1) / A x_t
        y_t = 2 Re(sum_n C_n h_{t,n}) + D x_t,    output = glu(W gelu(y) + b)

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space
    Models", section 3 (zero-order hold, B = 1), section 4 for the initialisations. One of each
    conjugate pair is kept, hence 2 Re. The state is bounded: h, N/2 complex numbers a channel.

    A sequence is convolved with the kernel 2 Re(sum_n C_n b_n exp(step A_n t)), to which the state
    adds its decaying part; a single token takes the recurrence. Both give the same.

    Args:
        d_model: D.
        d_state: N, even.
        init: of A: "lin", "inv", "quad", "real" (no oscillation) or "legs" (S4's own spectrum).
        dt_min, dt_max: steps start log-uniform between these.
        output: "glu" or "none", y itself.
        max_lr: peak learning rate of log_dt, log_A_real and A_imag where the optimizer's is
            higher; None: no bound.
        projection: makes W.
        backend: "reference", the recurrence token by token; or "auto", "triton", "torch", which are
            one: its convolution is by Fourier transforms, the vendor's library on every device.

    Parameters, named as in the public code (where the first four sit in a submodule `kernel`):
    log_dt (D,); C (D, N/2, 2), real and imaginary parts; log_A_real, A_imag (D, N/2); D (D,); and
    out_proj.weight (2D, D), out_proj.bias (2D,), there output_linear.0. All but out_proj keep the
    values given here; log_dt, log_A_real, A_imag, D and biases do not decay.

    Raises:
        ValueError: sizes, an unknown choice, or bounds of the step that do not fit.
    """

    bounded_state = True
    state_type = S4DState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: Literal["lin", "inv", "quad", "real", "legs"] = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        output: Literal["glu", "none"] = "glu",
        max_lr: float | None = 1e-3,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if d_model < 1 or d_state < 2 or d_state % 2:
            raise ValueError(
                f"d_model={d_model}, d_state={d_state}: expected at least 1, and an even number"
            )
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min={dt_min}, dt_max={dt_max}: expected 0 < dt_min <= dt_max")
        if init not in ("lin", "inv", "quad", "real", "legs"):
            raise ValueError(f"init={init!r}: allowed: lin, inv, quad, real, legs")
        if output not in ("glu", "none"):
            raise ValueError(f"output={output!r}: allowed: glu, none")
        if backend not in ("auto", "triton", "torch", "reference"):
            raise ValueError(f"backend={backend!r}: allowed: auto, triton, torch, reference")
        self.d_model, self.d_state, self.backend = d_model, d_state, backend
        self.init, self.dt_min, self.dt_max = init, dt_min, dt_max
        self.log_dt, self.D = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.C = nn.Parameter(torch.empty(d_model, d_state // 2, 2))
        self.log_A_real, self.A_imag = (
            nn.Parameter(torch.empty(d_model, d_state // 2)) for _ in range(2)
        )
        self.out_proj = projection(d_model, 2 * d_model, True) if output == "glu" else None
        if max_lr is not None and max_lr <= 0:
            raise ValueError(f"max_lr={max_lr}: expected above 0, or None")
        system = ("log_dt", "log_A_real", "A_imag")
        mark(self, *system, decay=False, own_init=True, max_lr=max_lr)
        mark(self, "D", decay=False, own_init=True)
        mark(self, "C", own_init=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the state spaces' parameters."""
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        self.log_dt.uniform_(low, high)
        self.C.normal_(std=0.5**0.5)  # of unit variance as a complex number
        self.D.normal_()
        decay, frequency = initial_spectrum(self.init, self.d_state)
        self.log_A_real.copy_(decay.log().expand_as(self.log_A_real))
        self.A_imag.copy_(frequency.expand_as(self.A_imag))

    def forward(
        self,
        x: Tensor,
        state: S4DState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, S4DState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        previous = x.new_full(x.shape[:1], NO_DOCUMENT, dtype=torch.int64)
        previous = previous if state is None else state.segment
        where = join(previous, segments)
        h = None if state is None else keep_rows(where.carry, state.h)
        if x.shape[1] == 1 or self.backend == "reference":
            y, h = self._recurrence(x, h, segments)
        else:
            y, h = self._convolution(x, h, segments, where, previous, want_state)
        y = y.to(x.dtype)
        if self.out_proj is not None:
            y = glu(self.out_proj(gelu(y)), dim=-1)
        return y, S4DState(h, where.last) if want_state and h is not None else None

    def kernel(self, length: int) -> Tensor:
        """The kernel (D, length), without D: what each channel is convolved with."""
        system = self.system()
        powers, block = _powers(system.log_a, length)
        first = (system.c * system.b)[:, None] * _exp(system.log_a, block)
        return 2 * _real_product(first, powers).flatten(1)[:, :length]

    def system(self) -> System:
        """The systems, discretised by zero-order hold, in float32 at least."""
        dtype = _sum_dtype(self.D)
        log_dt, log_real, imag = (p.to(dtype) for p in (self.log_dt, self.log_A_real, self.A_imag))
        A = torch.complex(-log_real.exp(), imag)
        log_a = A * log_dt.exp()[:, None]
        return System(log_a, _expm1(log_a) / A, torch.view_as_complex(self.C.to(dtype)))

    def _recurrence(
        self, x: Tensor, h: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y (B, T, D) and the final state, one token after the other."""
        system = self.system()
        x = x.to(_sum_dtype(self.D))
        if h is None:
            h = system.b.new_zeros(x.shape[0], *system.b.shape)
        a, outputs = system.log_a.exp(), []
        starts = None if segments is None else restarts(segments)
        for t, x_t in enumerate(x.unbind(1)):
            past = h if starts is None else keep_rows(~starts[:, t], h)
            after = a * past + system.b * x_t[..., None]
            outputs.append(2 * (system.c * after).real.sum(-1) + self.D * x_t)
            h = after
            if segments is not None:
                h = torch.where((segments[:, t] >= 0)[:, None, None], after, past)
        return torch.stack(outputs, 1), h

    def _convolution(
        self,
        x: Tensor,
        h: Tensor | None,
        segments: Tensor | None,
        where: Continuation,
        previous: Tensor,
        want_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """y (B, T, D), and the final state if asked for, by products over blocks of powers."""
        length = x.shape[1]
        y = long_conv(x, self.kernel(length), self.D, segments=segments)
        if h is not None:
            y = y + _only_first(_state_part(self.system(), h, length), segments)
        if not want_state:
            return y, None
        inputs, count = x.to(_sum_dtype(self.D)), None
        if segments is not None:
            mine = belongs(segments, where.last)
            (inputs,) = (u[..., 0] for u in newest(mine, length, inputs[..., None]))
            count = mine.sum(1)
            if h is not None:
                h = keep_rows(where.last == previous, h)
        return y, _final_state(self.system(), inputs, h, count)

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S4DState:
        """Zeros, whatever `max_len`; complex64 or complex128 whatever `dtype`."""
        device = self.D.device if device is None else device
        shape = batch_size, self.d_model, self.d_state // 2
        h = torch.zeros(shape, device=device, dtype=_sum_dtype(self.D).to_complex())
        return S4DState(h, torch.full((batch_size,), NO_DOCUMENT, device=device))

    def state_bytes(self, batch_size: int, length: int) -> int:
        """D N/2 complex numbers and one integer per row, whatever the length."""
        return batch_size * (self.d_model * self.d_state * _sum_dtype(self.D).itemsize + 8)

    def flops(self, batch_size: int, length: int) -> int:
        """The kernel, its convolution and the projection behind it.

        A single token is elementwise, which FlopCounterMode does not count.
        """
        tokens = batch_size * length
        gate = 0 if self.out_proj is None else projection_flops(self.out_proj, tokens)
        if length == 1 or self.backend == "reference":
            return gate
        size = _block(length)
        kernel = 2 * self.d_model * self.d_state * size * -(-length // size)
        return kernel + long_conv_flops(batch_size, length, self.d_model, length) + gate


def initial_spectrum(init: str, d_state: int) -> tuple[Tensor, Tensor]:
    """-Re A and Im A (N/2,) that a channel starts from (section 4 of the paper)."""
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    half = torch.full_like(n, 0.5)
    if init == "lin":
        return half, math.pi * n
    if init == "inv":
        return half, d_state / math.pi * (d_state / (2 * n + 1) - 1)
    if init == "quad":
        return half, (1 + 2 * n) ** 2 / math.pi
    if init == "real":
        return n + 1, torch.zeros_like(n)
    # HiPPO-LegS, made normal by its rank-1 term, is -1/2 + a skew-symmetric matrix.
    root = (2 * torch.arange(d_state, dtype=torch.float64, device="cpu") + 1).sqrt()
    skew = (root[:, None] * root / 2).triu(1)
    return half, torch.linalg.eigvalsh(-1j * (skew - skew.T))[d_state // 2 :]


def _block(length: int) -> int:
    return math.isqrt(length - 1) + 1


def _powers(log_a: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """a^j (D, N/2, c) for j < c, and the exponents (ceil(length / c),) of the blocks' starts."""
    size = _block(length)
    steps = torch.arange(size, device=log_a.device)
    starts = torch.arange(0, length, size, device=log_a.device)
    return _exp(log_a, steps).mT, starts


def _exp(log_a: Tensor, steps: Tensor) -> Tensor:
    """a^steps, (D, len(steps), N/2)."""
    return (log_a[:, None] * steps[:, None]).exp()


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 of complex z, without cancellation where z is small."""
    x, y = z.real, z.imag
    return torch.complex(x.expm1() * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())


@outside_autocast
def _real_product(x: Tensor, y: Tensor) -> Tensor:
    """Re(x @ y) of complex x (D, R, K) and y (D, K, M), as one real product."""
    left = torch.view_as_real(x.conj().resolve_conj().contiguous()).flatten(-2)
    right = torch.view_as_real(y.mT.contiguous()).flatten(-2)
    return torch.bmm(left, right.mT)


def _state_part(system: System, h: Tensor, length: int) -> Tensor:
    """What the state h (B, D, N/2) adds to the next outputs, (B, T, D)."""
    batch = h.shape[0]
    powers, starts = _powers(system.log_a, length)
    # The state is the one before the first step: it has decayed once when y_0 reads it.
    first = (system.c * system.log_a.exp() * h)[:, :, None] * _exp(system.log_a, starts)
    rows = first.transpose(0, 1).flatten(1, 2)  # (D, B * blocks, N/2)
    part = 2 * _real_product(rows, powers).unflatten(1, (batch, -1)).flatten(2)
    return part[..., :length].permute(1, 2, 0)


def _only_first(part: Tensor, segments: Tensor | None) -> Tensor:
    """`part` (B, T, D) at the tokens of each row's first document, zero elsewhere."""
    if segments is None:
        return part
    batch, length = segments.shape
    index = positions(segments, length, segments.new_zeros(batch, dtype=torch.int64))
    here = belongs(segments, first_document(segments))
    return torch.take_along_dim(part, index[..., None], 1) * here[..., None]


@outside_autocast
def _final_state(system: System, inputs: Tensor, h: Tensor | None, count: Tensor | None) -> Tensor:
    """The state (B, D, N/2) after inputs (B, T, D), the last of which end at T.

    Args:
        h: the state before them, None for zeros.
        count: (B,) how many of them there are in each row; T by default.
    """
    batch, length, _ = inputs.shape
    powers, starts = _powers(system.log_a, length)
    size = powers.shape[-1]
    lags = pad(inputs.flip(1), (0, 0, 0, size * len(starts) - length))
    lags = lags.unflatten(1, (-1, size)).permute(3, 2, 0, 1).flatten(2)  # (D, c, B * blocks)
    parts = torch.view_as_real(powers).permute(0, 1, 3, 2).flatten(1, 2)  # (D, N, c)
    sums = torch.bmm(parts, lags).unflatten(1, (-1, 2)).unflatten(3, (batch, -1))
    sums = torch.view_as_complex(sums.permute(3, 0, 4, 1, 2).contiguous())  # (B, D, blocks, N/2)
    after = system.b * (sums * _exp(system.log_a, starts)).sum(2)
    if h is None:
        return after
    steps = inputs.new_tensor(length) if count is None else count[:, None, None]
    return after + (system.log_a * steps).exp() * h


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32: the dtype of states' parts."""
    return torch.promote_types(parameter.dtype, torch.float32)
