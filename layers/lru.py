"""The linear recurrent unit: a complex diagonal recurrence between two dense complex maps.

B batch, T time, D model width, N state.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, linear

from kernels.linear_recurrence import linear_recurrence, linear_recurrence_flops
from kernels.segments import restarts
from layers.marks import mark
from layers.mixer import Mixer
from layers.projection import Dense, Projection, projection_flops
from layers.report import Report
from layers.segments import NO_DOCUMENT, join, keep_rows


@dataclass(frozen=True, eq=False)
class LRUState:
    """What the recurrence remembers of the document each row ended in."""

    h: Tensor  # (B, N) complex64 or complex128
    segment: Tensor  # (B,) int64 document that the row ended in


class LRU(Mixer):
    """Linear recurrent unit, with the gated linear unit that its blocks put behind it.

        lambda = exp(-exp(nu_log) + i exp(theta_log)),    gamma = exp(gamma_log)
        h_t = lambda h_{t-1} + gamma (B x_t),    y_t = Re(C h_t) + D x_t
        output = glu(W gelu(y) + b)

    Source: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences",
    equations 5 to 7, lemma 3.2 for the initialisation and appendix A for the code. |lambda| < 1
    whatever the parameters, and gamma starts at sqrt(1 - |lambda|^2), which keeps h of one size.
    The state is bounded: h, N complex numbers.

    Args:
        d_model: D.
        d_state: N; D by default.
        r_min, r_max: |lambda| starts in this ring, uniform in its area.
        max_phase: and its angle uniform in [0, max_phase).
        output: "glu" or "none", y itself.
        projection: makes W. B and C are the recurrence's own and stay dense.
        backend: form of kernels.linear_recurrence.

    Parameters, named as in the paper's code: nu_log, theta_log, gamma_log (N,); B_re, B_im (N, D);
    C_re, C_im (D, N); D (D,); and out_proj.weight (2D, D), out_proj.bias (2D,). All but out_proj
    keep the values given here; nu_log, theta_log, gamma_log, D and biases do not decay.

    Raises:
        ValueError: sizes below 1, an unknown output, or no ring 0 <= r_min < r_max <= 1.
    """

    bounded_state = True
    state_type = LRUState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        output: Literal["glu", "none"] = "glu",
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        size = d_model if d_state is None else d_state
        if min(d_model, size) < 1:
            raise ValueError(f"d_model={d_model}, d_state={d_state}: each must be at least 1")
        if not 0 <= r_min < r_max <= 1 or max_phase <= 0:
            raise ValueError(
                f"r_min={r_min}, r_max={r_max}, max_phase={max_phase}: "
                "expected 0 <= r_min < r_max <= 1 and max_phase > 0"
            )
        if output not in ("glu", "none"):
            raise ValueError(f"output={output!r}: allowed: glu, none")
        self.d_model, self.d_state, self.backend = d_model, size, backend
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.nu_log, self.theta_log, self.gamma_log = (
            nn.Parameter(torch.empty(size)) for _ in range(3)
        )
        self.B_re, self.B_im = (nn.Parameter(torch.empty(size, d_model)) for _ in range(2))
        self.C_re, self.C_im = (nn.Parameter(torch.empty(d_model, size)) for _ in range(2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = projection(d_model, 2 * d_model, True) if output == "glu" else None
        mark(self, "nu_log", "theta_log", "gamma_log", "D", decay=False, own_init=True)
        mark(self, "B_re", "B_im", "C_re", "C_im", own_init=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the recurrence's parameters."""
        low, high = self.r_min**2, self.r_max**2
        # From (0, 1]: |lambda| = 0 or an angle of 0 has no finite logarithm.
        square = low + (high - low) * (1 - torch.rand_like(self.nu_log))
        square = square.clamp(max=1 - 1e-6)  # float32 rounds the largest of them to 1
        self.nu_log.copy_((-0.5 * square.log()).log())
        self.theta_log.copy_((self.max_phase * (1 - torch.rand_like(self.theta_log))).log())
        self.gamma_log.copy_(0.5 * torch.log1p(-square))
        for weight, fan in ((self.B_re, 2 * self.d_model), (self.C_re, self.d_state)):
            weight.normal_(std=fan**-0.5)
        self.B_im.normal_(std=(2 * self.d_model) ** -0.5)
        self.C_im.normal_(std=self.d_state**-0.5)
        self.D.normal_()

    def forward(
        self,
        x: Tensor,
        state: LRUState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, LRUState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        previous = x.new_full(x.shape[:1], NO_DOCUMENT, dtype=torch.int64)
        carry, last = join(previous if state is None else state.segment, segments)
        rates, inputs = self._rates(), self._read_in(x)
        if segments is not None:
            padding = (segments < 0)[..., None]
            rates = rates.masked_fill(restarts(segments)[..., None], 0).masked_fill(padding, 1)
            inputs = inputs.masked_fill(padding, 0)
        past = None if state is None else keep_rows(carry, state.h)
        h = linear_recurrence(rates, inputs, past, backend=self.backend)
        y = self._read_out(h, x)
        if self.out_proj is not None:
            y = glu(self.out_proj(gelu(y)), dim=-1)
        return y, LRUState(h[:, -1].clone(), last) if want_state else None

    def _rates(self) -> Tensor:
        """lambda (N,), complex."""
        dtype = _sum_dtype(self.nu_log)
        size, angle = (-self.nu_log.to(dtype).exp()).exp(), self.theta_log.to(dtype).exp()
        return torch.polar(size, angle)

    def _read_in(self, x: Tensor) -> Tensor:
        """gamma (B x), (B, T, N) complex, by one real product."""
        weight = torch.stack([self.B_re, self.B_im], 1) * self.gamma_log.exp()[:, None, None]
        parts = linear(x, weight.flatten(0, 1)).to(_sum_dtype(self.D))
        return torch.view_as_complex(parts.unflatten(-1, (-1, 2)))

    def _read_out(self, h: Tensor, x: Tensor) -> Tensor:
        """Re(C h) + D x in the dtype of x, by one real product."""
        weight = torch.stack([self.C_re, -self.C_im], -1).flatten(1)
        y = linear(torch.view_as_real(h).flatten(-2).to(x.dtype), weight)
        return (y + self.D * x).to(x.dtype)

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LRUState:
        """Zeros, whatever `max_len`; complex64 or complex128 whatever `dtype`."""
        device = self.D.device if device is None else device
        h = torch.zeros(
            batch_size, self.d_state, device=device, dtype=_sum_dtype(self.D).to_complex()
        )
        return LRUState(h, torch.full((batch_size,), NO_DOCUMENT, device=device))

    def state_bytes(self, batch_size: int, length: int) -> int:
        """N complex numbers and one integer per row, whatever the length."""
        return batch_size * (2 * self.d_state * _sum_dtype(self.D).itemsize + 8)

    def flops(self, batch_size: int, length: int) -> int:
        """B, C, the recurrence and the projection behind it."""
        tokens = batch_size * length
        maps = 2 * 2 * tokens * self.d_model * 2 * self.d_state
        steps = linear_recurrence_flops(batch_size, length, self.d_state, is_complex=True)
        gate = 0 if self.out_proj is None else projection_flops(self.out_proj, tokens)
        return maps + steps + gate


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32: the dtype of states' parts."""
    return torch.promote_types(parameter.dtype, torch.float32)
