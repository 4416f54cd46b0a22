"""Mamba: a selective state space behind a short convolution, gated.

B batch, T time, D model width, E = expand D inner width, N state, R rank of the steps, W taps.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kernels.selective_scan import selective_scan, selective_scan_flops
from layers.conv import ShortConv
from layers.marks import mark
from layers.mixer import Mixer
from layers.projection import Dense, Projection, projection_flops
from layers.report import Report
from layers.segments import NO_DOCUMENT, join, keep_rows


@dataclass(frozen=True, eq=False)
class MambaState:
    """What the convolution and the scan remember of the document each row ended in."""

    conv: Tensor  # (B, W-1, E) inputs of the convolution, newest last, zeros before the start
    ssm: Tensor  # (B, E, N) h, float32 or float64
    segment: Tensor  # (B,) int64 document that the row ended in


class Mamba(Mixer):
    """Mamba's selective state space layer.

        u, z = W_in x,    u = silu(conv_W(u)),    r, B, C = W_x u
        step = softplus(W_dt r + b_dt),    A = -exp(A_log)
        h_t = exp(step_t A) h_{t-1} + step_t B_t u_t
        y_t = W_out ((C_t h_t + D u_t) silu(z_t))

    Source: Gu and Dao 2023 (Mamba), Algorithm 2 and section 3.4, with the initialisation of the
    public code. The state is bounded: h and the last W-1 inputs of the convolution.

    Differs from the paper as its code does: B is discretised by Euler's rule (see
    kernels.selective_scan). One Mamba layer has about half the parameters of an attention layer
    with its channel mixer: the paper's models have twice the layers and no channel mixers.

    Args:
        d_model: D.
        d_state: N.
        conv_size: W.
        expand: E / D.
        dt_rank: R; D / 16, rounded up, by default.
        dt_min, dt_max: steps start log-uniform between these.
        dt_init_floor: and at least this.
        dt_init: W_dt starts uniform within dt_scale R^-1/2 ("random") or at it ("constant").
        dt_scale: see dt_init.
        conv_bias: a bias in the convolution.
        bias: biases in in_proj and out_proj.
        num_layers: depth of the stack; W_out starts divided by its square root, as in stacks of
            the public code that have no channel mixers.
        projection: makes in_proj, x_proj and out_proj. W_dt is one factor of a low-rank map with an
            initialisation of its own, and stays dense.
        backend: form of kernels.causal_conv1d and kernels.selective_scan.

    Parameters, named as in the public code: in_proj.weight (2E, D), rows of u before rows of z;
    conv1d.weight (E, W) (files with (E, 1, W) load too), conv1d.bias (E,); x_proj.weight
    (R + 2N, E), rows of r, B, C; dt_proj.weight (E, R), dt_proj.bias (E,); A_log (E, N); D (E,);
    out_proj.weight (D, E). A_log, D and the biases do not decay. All keep the values given here:
    A_log = log(1..N), D = 1, and dense projections uniform within fan_in^-1/2.

    Raises:
        ValueError: sizes below 1, an unknown dt_init, or bounds of the step that do not fit.
    """

    bounded_state = True
    state_type = MambaState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        conv_size: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        conv_bias: bool = True,
        bias: bool = False,
        num_layers: int = 1,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        rank = -(-d_model // 16) if dt_rank is None else dt_rank
        check_sizes(
            d_model=d_model,
            d_state=d_state,
            conv_size=conv_size,
            expand=expand,
            dt_rank=rank,
            num_layers=num_layers,
        )
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init={dt_init!r}: allowed: random, constant")
        inner = expand * d_model
        self.d_model, self.d_inner, self.d_state, self.dt_rank = d_model, inner, d_state, rank
        self.backend = backend
        self.in_proj = projection(d_model, 2 * inner, bias)
        self.conv1d = ShortConv(
            inner, conv_size, bias=conv_bias, activation="silu", backend=backend
        )
        self.x_proj = projection(inner, rank + 2 * d_state, False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = projection(inner, d_model, bias)

        with torch.no_grad():
            bound = dt_scale * rank**-0.5
            if dt_init == "random":
                self.dt_proj.weight.uniform_(-bound, bound)
            else:
                self.dt_proj.weight.fill_(bound)
            self.dt_proj.bias.copy_(step_bias(inner, dt_min, dt_max, dt_init_floor))
        mark(self.dt_proj, "weight", own_init=True)
        mark(self.dt_proj, "bias", decay=False, own_init=True)
        mark(self, "A_log", "D", decay=False, own_init=True)
        keep_default_init(self.in_proj, self.x_proj)
        keep_default_init(self.out_proj, scale=num_layers**-0.5)
        self.register_load_state_dict_pre_hook(squeeze_conv1d)

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, MambaState | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        previous = x.new_full(x.shape[:1], NO_DOCUMENT, dtype=torch.int64)
        carry, last = join(previous if state is None else state.segment, segments)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        past = None if state is None else keep_rows(carry, state.conv).to(u.dtype)
        u, conv = self.conv1d(u, past, segments=segments, want_state=want_state)
        r, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm = selective_scan(
            u.mT,
            linear(r, self.dt_proj.weight).mT,  # its bias is added in the scan, in float32
            decay_rates(self.A_log),
            B.mT,
            C.mT,
            self.D,
            z.mT,
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=None if state is None else keep_rows(carry, state.ssm),
            return_last_state=True,
            segments=segments,
            backend=self.backend,
        )
        return self.out_proj(y.mT), None if conv is None else MambaState(conv, ssm, last)

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Zeros, whatever `max_len`; h is float32 or float64 whatever `dtype`."""
        device = self.D.device if device is None else device
        taps = self.conv1d.weight.shape[1]
        return MambaState(
            torch.zeros(
                batch_size, taps - 1, self.d_inner, device=device, dtype=dtype or self.D.dtype
            ),
            torch.zeros(
                batch_size, self.d_inner, self.d_state, device=device, dtype=sum_dtype(self.D)
            ),
            torch.full((batch_size,), NO_DOCUMENT, device=device),
        )

    def state_bytes(self, batch_size: int, length: int) -> int:
        """W-1 inputs of the convolution, h, and one integer per row, whatever the length."""
        conv = (self.conv1d.weight.shape[1] - 1) * self.d_inner * self.D.dtype.itemsize
        ssm = self.d_inner * self.d_state * sum_dtype(self.D).itemsize
        return batch_size * (conv + ssm + 8)

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, the convolution and the scan."""
        tokens = batch_size * length
        dense = sum(projection_flops(p, tokens) for p in (self.in_proj, self.x_proj, self.out_proj))
        return (
            dense
            + projection_flops(self.dt_proj, tokens)
            + self.conv1d.flops(batch_size, length)
            + selective_scan_flops(batch_size, length, self.d_inner, self.d_state)
        )


def step_bias(size: int, low: float, high: float, floor: float) -> Tensor:
    """(size,) whose softplus is log-uniform in [low, high], and at least `floor`.

    Raises:
        ValueError: not 0 < low <= high, or a floor that is not positive.
    """
    if not 0 < low <= high or floor <= 0:
        raise ValueError(
            f"dt_min={low}, dt_max={high}, dt_init_floor={floor}: "
            "expected 0 < dt_min <= dt_max and dt_init_floor > 0"
        )
    spread = torch.rand(size) * (math.log(high) - math.log(low))
    steps = (spread + math.log(low)).exp().clamp(min=floor)
    return steps + (-torch.expm1(-steps)).log()  # the inverse of softplus, without overflow


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least: half precision would overflow or lose the small."""
    return -A_log.to(sum_dtype(A_log)).exp()


def sum_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32: the dtype of states."""
    return torch.promote_types(parameter.dtype, torch.float32)


def keep_default_init(*modules: nn.Module, scale: float = 1.0) -> None:
    """Keep torch's own initialisation of dense projections, times `scale`.

    Projections of another kind are left alone, by the model's initialiser too.
    """
    for module in modules:
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.mul_(scale)
            mark(module, "weight", own_init=True)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: expected at least 1")


def squeeze_conv1d(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let conv1d.weight (E, 1, W), as torch's Conv1d saves it, load into (E, W)."""
    weight = state_dict.get(f"{prefix}conv1d.weight")
    if isinstance(weight, Tensor) and weight.ndim == 3:
        state_dict[f"{prefix}conv1d.weight"] = weight.squeeze(1)
