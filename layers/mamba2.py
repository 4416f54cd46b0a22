"""Mamba-2: a state space with one decay per head, computed by matrix products.

B batch, T time, D model width, E = expand D inner width, S width of the state space (E, or less
beside a gated MLP), H heads of width P, S = H P, N state, G groups, W taps.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kernels import rms_norm
from kernels.ssd import ssd, ssd_flops
from layers.conv import ShortConv
from layers.mamba import (
    check_sizes,
    decay_rates,
    keep_default_init,
    squeeze_conv1d,
    step_bias,
    sum_dtype,
)
from layers.marks import mark
from layers.mixer import Mixer
from layers.projection import Dense, Projection, projection_flops
from layers.report import Report
from layers.segments import NO_DOCUMENT, join, keep_rows


@dataclass(frozen=True, eq=False)
class Mamba2State:
    """What the convolution and the scan remember of the document each row ended in."""

    conv: Tensor  # (B, W-1, S + 2GN) inputs of the convolution, newest last, zeros at the start
    ssm: Tensor  # (B, H, P, N), float32 or float64
    segment: Tensor  # (B,) int64 document that the row ended in


class GatedRMSNorm(nn.Module):
    """RMSNorm with a gate, over groups of channels (Dao and Gu 2024, section 7.3).

    Parameters: weight (width,), ones.

    Args:
        width: channels of the last dimension.
        group_size: channels that share one mean.
        norm_before_gate: norm(x) * silu(gate), and not norm(x * silu(gate)).
        eps: added to the mean square.
        backend: form of kernels.rms_norm.
    """

    def __init__(
        self, width: int, *, group_size: int, norm_before_gate: bool, eps: float, backend: str
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.eps = eps
        self.backend = backend
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate (..., width) -> (..., width)."""
        return rms_norm(
            x,
            self.weight,
            gate=gate,
            norm_before_gate=self.norm_before_gate,
            group_size=self.group_size,
            eps=self.eps,
            backend=self.backend,
        )


class Mamba2(Mixer):
    """Mamba-2's state space layer.

        z, x, B, C, dt = W_in u,    x, B, C = silu(conv_W(x, B, C))
        step = softplus(dt + dt_bias),    A = -exp(A_log)
        S_t = exp(step_t A) S_{t-1} + step_t x_t B_t^T
        y_t = W_out norm((S_t C_t + D x_t) silu(z_t))

    with one step and one A for each head, and B and C shared by the heads of a group.
    Source: Dao and Gu 2024 (Transformers are SSMs), sections 6 and 7, with the initialisation of
    the public code. The state is bounded: S and the last W-1 inputs of the convolution.

    Differs from the public code: no learned initial state, which documents would have to share.

    Args:
        d_model: D.
        d_state: N.
        head_dim: P.
        num_groups: G, a divisor of H.
        conv_size: W.
        expand: E / D.
        d_ssm: S; E by default. What is left of E passes by the state space as a gated MLP.
        A_min, A_max: -A starts uniform between these.
        dt_min, dt_max: steps start log-uniform between these.
        dt_init_floor: and at least this.
        dt_limit_min, dt_limit_max: steps are clamped to these.
        norm: gated RMSNorm before W_out; without it y * silu(z) goes there as it is.
        norm_before_gate: norm(y) * silu(z) in place of norm(y * silu(z)).
        norm_eps: added to the mean square.
        D_has_head_dim: a D for each channel and not for each head.
        conv_bias: a bias in the convolution.
        bias: biases in in_proj and out_proj.
        chunk_size: steps per chunk of the scan; changes speed, and results by rounding only.
        num_layers: depth of the stack; W_out starts divided by its square root, as in stacks of
            the public code that have no channel mixers.
        projection: makes in_proj and out_proj.
        backend: form of kernels.causal_conv1d, kernels.ssd and kernels.rms_norm.

    Parameters, named as in the public code: in_proj.weight (2E + 2GN + H, D), rows of z0 (E - S),
    x0 (E - S), z (S), x (S), B (GN), C (GN), dt (H), where z0 and x0 are the MLP's; conv1d.weight
    (S + 2GN, W) (files with (S + 2GN, 1, W) load too), conv1d.bias (S + 2GN,); dt_bias (H,);
    A_log (H,); D (H,) or (S,); norm.weight (S,); out_proj.weight (D, E). A_log, D, dt_bias and the
    other biases and gains do not decay. All keep the values given here: D and norm.weight are 1,
    dense projections uniform within fan_in^-1/2.

    Raises:
        ValueError: sizes below 1, heads or groups that do not divide, or bounds that do not fit.
    """

    bounded_state = True
    state_type = Mamba2State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        head_dim: int = 64,
        num_groups: int = 1,
        conv_size: int = 4,
        expand: int = 2,
        d_ssm: int | None = None,
        A_min: float = 1.0,
        A_max: float = 16.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit_min: float = 0.0,
        dt_limit_max: float = inf,
        norm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        D_has_head_dim: bool = False,
        conv_bias: bool = True,
        bias: bool = False,
        chunk_size: int = 64,
        num_layers: int = 1,
        projection: Projection = Dense,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner = expand * d_model
        width = inner if d_ssm is None else d_ssm
        check_sizes(
            d_model=d_model,
            d_state=d_state,
            head_dim=head_dim,
            num_groups=num_groups,
            conv_size=conv_size,
            expand=expand,
            d_ssm=width,
            chunk_size=chunk_size,
            num_layers=num_layers,
        )
        if width % head_dim or width > inner:
            raise ValueError(
                f"head_dim={head_dim}, d_ssm={width}: expected head_dim to divide d_ssm, "
                f"and d_ssm <= expand * d_model = {inner}"
            )
        heads = width // head_dim
        if heads % num_groups:
            raise ValueError(f"num_groups={num_groups}: expected a divisor of the {heads} heads")
        if not 0 < A_min <= A_max:
            raise ValueError(f"A_min={A_min}, A_max={A_max}: expected 0 < A_min <= A_max")
        if not 0 <= dt_limit_min < dt_limit_max:
            raise ValueError(
                f"dt_limit_min={dt_limit_min}, dt_limit_max={dt_limit_max}: "
                "expected 0 <= dt_limit_min < dt_limit_max"
            )
        self.d_model, self.d_state, self.chunk_size = d_model, d_state, chunk_size
        self.num_heads, self.head_dim, self.num_groups = heads, head_dim, num_groups
        self.dt_limit = (dt_limit_min, dt_limit_max)
        self.backend = backend
        shared = num_groups * d_state
        self.splits = [inner - width] * 2 + [width, width + 2 * shared, heads]
        self.in_proj = projection(d_model, sum(self.splits), bias)
        self.conv1d = ShortConv(
            width + 2 * shared, conv_size, bias=conv_bias, activation="silu", backend=backend
        )
        self.dt_bias = nn.Parameter(step_bias(heads, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter((A_min + torch.rand(heads) * (A_max - A_min)).log())
        self.D = nn.Parameter(torch.ones(width if D_has_head_dim else heads))
        self.norm = None
        if norm:
            self.norm = GatedRMSNorm(
                width,
                group_size=width // num_groups,
                norm_before_gate=norm_before_gate,
                eps=norm_eps,
                backend=backend,
            )
        self.out_proj = projection(inner, d_model, bias)
        mark(self, "dt_bias", "A_log", "D", decay=False, own_init=True)
        keep_default_init(self.in_proj)
        keep_default_init(self.out_proj, scale=num_layers**-0.5)
        self.register_load_state_dict_pre_hook(squeeze_conv1d)

    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        *,
        segments: Tensor | None = None,
        prefix_len: Tensor | None = None,
        want_state: bool = False,
        report: Report | None = None,
    ) -> tuple[Tensor, Mamba2State | None]:
        """(B, T, D) -> (B, T, D) under the mixer contract."""
        self.check_input(x, state, segments)
        previous = x.new_full(x.shape[:1], NO_DOCUMENT, dtype=torch.int64)
        carry, last = join(previous if state is None else state.segment, segments)
        z0, x0, z, xBC, dt = self.in_proj(x).split(self.splits, dim=-1)
        past = None if state is None else keep_rows(carry, state.conv).to(xBC.dtype)
        xBC, conv = self.conv1d(xBC, past, segments=segments, want_state=want_state)
        initial = None if state is None else keep_rows(carry, state.ssm)
        y, ssm = self._scan(xBC, z, dt, initial, segments)
        if self.norm is not None:
            y = self.norm(y, z)
        if x0.shape[-1]:
            y = torch.cat([silu(z0) * x0, y], dim=-1)
        return self.out_proj(y), None if conv is None else Mamba2State(conv, ssm, last)

    def _scan(
        self, xBC: Tensor, z: Tensor, dt: Tensor, initial: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y (B, T, S), gated where no norm does it, and the last state."""
        heads, groups = (self.num_heads, self.head_dim), (self.num_groups, self.d_state)
        shared = self.num_groups * self.d_state
        x, B, C = xBC.split([z.shape[-1], shared, shared], dim=-1)
        y, ssm = ssd(
            x.unflatten(-1, heads),
            dt,
            decay_rates(self.A_log),
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
            chunk_size=self.chunk_size,
            D=self.D if len(self.D) == self.num_heads else self.D.view(heads),
            z=z.unflatten(-1, heads) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_states=initial,
            return_final_states=True,
            segments=segments,
            backend=self.backend,
        )
        return y.flatten(-2), ssm

    def new_state(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba2State:
        """Zeros, whatever `max_len`; S is float32 or float64 whatever `dtype`."""
        device = self.D.device if device is None else device
        channels, taps = self.conv1d.weight.shape
        ssm = (batch_size, self.num_heads, self.head_dim, self.d_state)
        return Mamba2State(
            torch.zeros(batch_size, taps - 1, channels, device=device, dtype=dtype or self.D.dtype),
            torch.zeros(ssm, device=device, dtype=sum_dtype(self.D)),
            torch.full((batch_size,), NO_DOCUMENT, device=device),
        )

    def state_bytes(self, batch_size: int, length: int) -> int:
        """W-1 inputs of the convolution, S, and one integer per row, whatever the length."""
        channels, taps = self.conv1d.weight.shape
        conv = (taps - 1) * channels * self.D.dtype.itemsize
        ssm = self.num_heads * self.head_dim * self.d_state * sum_dtype(self.D).itemsize
        return batch_size * (conv + ssm + 8)

    def flops(self, batch_size: int, length: int) -> int:
        """Projections, the convolution and the scan."""
        tokens = batch_size * length
        dense = projection_flops(self.in_proj, tokens) + projection_flops(self.out_proj, tokens)
        scan = ssd_flops(
            batch_size,
            length,
            self.num_heads,
            self.head_dim,
            self.d_state,
            self.num_groups,
            self.chunk_size,
        )
        return dense + self.conv1d.flops(batch_size, length) + scan
