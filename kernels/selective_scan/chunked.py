"""The selective scan over tiles of steps, forward and backward, in plain PyTorch.

A tile is discretised in whole-tile operations, scanned in place one step at a time, and read out
by a batched product; nothing larger than a tile ever has the state dimension. The backward pass
starts from the kept state in front of each tile, scans the tile again, and then scans the adjoint
of the state backwards.

B batch, D channels, L time, N state, G groups, S steps of a tile, whose states are (S, B, N, D).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.selective_scan.tiles import STEPS, Block, Scan, Tile, time_first

silu_backward = torch.ops.aten.silu_backward
softplus_backward = torch.ops.aten.softplus_backward
SOFTPLUS = (1.0, 20.0)  # beta, and the threshold above which softplus is the identity


class Gradients(NamedTuple):
    """Of the arguments of the same name; those of arguments that were not given are arbitrary."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    delta_bias: Tensor
    initial_state: Tensor


class _Buffer:
    """Room for the states of one tile, as a whole and step by step."""

    def __init__(self, step: Tensor, length: int) -> None:
        self.whole = step.new_empty(min(STEPS, length), *step.shape)
        self.steps = self.whole.unbind(0)


def forward(scan: Scan, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, D, L), the last state (B, D, N), and the states in front of the tiles.

    The latter are (tiles, B, N, D) with `keep_states`, else empty.
    """
    batch, channels, length = scan.u.shape
    N = scan.A.shape[1]
    y = torch.empty_like(scan.u)
    last = scan.u.new_empty(batch, channels, N, dtype=scan.dtype)
    states = (
        last.new_empty(len(scan.starts), batch, N, channels) if keep_states else last.new_empty(0)
    )
    for block in scan.blocks():
        rows, channels, _ = block
        A, D, h = scan.rates(block), scan.skip(block), scan.first_state(block)
        decay, hs = _Buffer(h, length), _Buffer(h, length)
        for i, start in enumerate(scan.starts):
            if keep_states:
                states[i, rows, :, channels] = h
            tile = scan.tile(block, start)
            h.copy_(_scan(tile, A, h, decay, hs))
            out = _read(tile, D, hs)
            if tile.z is not None:
                out *= silu(tile.z)
            y[rows, channels, start : start + STEPS] = out.permute(1, 2, 0)
        last[rows, channels] = h.mT
    return y, last, states


def backward(scan: Scan, states: Tensor, grad_y: Tensor, grad_last: Tensor) -> Gradients:
    """Gradients from those of y (B, D, L) and of the last state (B, D, N)."""
    grads = new_gradients(scan, grad_last)
    for block in scan.blocks():
        _backward_block(scan, block, states, grad_y, grad_last, grads)
    return grads


def new_gradients(scan: Scan, grad_last: Tensor) -> Gradients:
    """Room for the gradients; zeros where tiles and blocks add to them."""
    u, dtype = scan.u, scan.dtype
    return Gradients(
        u=torch.empty_like(u),
        delta=torch.empty_like(scan.delta),
        A=torch.zeros_like(scan.A, dtype=dtype),
        B=torch.zeros_like(scan.B, dtype=dtype),
        C=torch.zeros_like(scan.C, dtype=dtype),
        D=u.new_zeros(u.shape[1], dtype=dtype),
        z=u.new_empty(0) if scan.z is None else torch.empty_like(scan.z),
        delta_bias=u.new_zeros(u.shape[1], dtype=dtype),
        initial_state=torch.empty_like(grad_last, dtype=dtype),
    )


def _backward_block(
    scan: Scan, block: Block, states: Tensor, grad_y: Tensor, grad_last: Tensor, grads: Gradients
) -> None:
    rows, channels, group = block
    A, D = scan.rates(block), scan.skip(block)
    adjoint = grad_last[rows, channels].mT.to(scan.dtype, copy=True).contiguous()  # (B, N, D)
    decay, hs, work = (_Buffer(adjoint, scan.u.shape[2]) for _ in range(3))
    grad_A = torch.zeros_like(A)
    for i, start in reversed(list(enumerate(scan.starts))):
        here = rows, channels, slice(start, start + STEPS)
        shared = rows, group, slice(None), here[2]
        tile, h = scan.tile(block, start), states[i, rows, :, channels]
        g = time_first(grad_y[here], scan.dtype)
        _scan(tile, A, h, decay, hs)
        if tile.z is not None:
            grads.z[here] = silu_backward(g * _read(tile, D, hs), tile.z).permute(1, 2, 0)
            g = g * silu(tile.z)
        _adjoint_scan(tile, g, adjoint, decay, work)

        n = len(g)
        lam = work.whole[:n]
        grads.C[shared] += (hs.whole[:n] @ g[..., None]).squeeze(3).permute(1, 2, 0)
        grads.B[shared] += (lam @ (tile.step * tile.u)[..., None]).squeeze(3).permute(1, 2, 0)
        into = (tile.B[:, :, None] @ lam).squeeze(2)  # (S, B, D), gradient of step * u
        grad_u = tile.step * into
        if D is not None:
            grad_u.addcmul_(g, D)
            grads.D[channels] += (g * tile.u).sum((0, 1))
        grads.u[here] = grad_u.permute(1, 2, 0)

        by_rate = _exponent_gradient(lam, h, decay, hs)
        grad_A += torch.mul(by_rate, tile.step[:, :, None], out=decay.whole[:n]).sum((0, 1))
        grad_step = torch.mul(by_rate, A, out=decay.whole[:n]).sum(2)
        grad_step.addcmul_(tile.u, into)
        if tile.padding is not None:
            grad_step.masked_fill_(tile.padding, 0)
        if scan.delta_softplus:
            grad_step = softplus_backward(grad_step, tile.delta, *SOFTPLUS)
        grads.delta[here] = grad_step.permute(1, 2, 0)
        grads.delta_bias[channels] += grad_step.sum((0, 1))
    grads.A[channels] += grad_A.T
    grads.initial_state[rows, channels] = adjoint.mT


def _scan(tile: Tile, A: Tensor, h: Tensor, decay: _Buffer, hs: _Buffer) -> Tensor:
    """Fill `decay` with exp(step A) and `hs` with the states, starting from h; the last state."""
    n = len(tile.u)
    a = torch.mul(tile.step[:, :, None], A, out=decay.whole[:n]).exp_()
    if tile.restart is not None:
        a.masked_fill_(tile.restart, 0)
    torch.mul((tile.step * tile.u)[:, :, None], tile.B[..., None], out=hs.whole[:n])
    for a_t, h_t in zip(decay.steps[:n], hs.steps, strict=False):
        h = h_t.addcmul_(a_t, h)
    return h


def _read(tile: Tile, D: Tensor | None, hs: _Buffer) -> Tensor:
    """C h + D u, (S, B, D)."""
    y = (tile.C[:, :, None] @ hs.whole[: len(tile.u)]).squeeze(2)
    return y if D is None else y.addcmul_(tile.u, D)


def _adjoint_scan(tile: Tile, g: Tensor, adjoint: Tensor, decay: _Buffer, work: _Buffer) -> None:
    """Fill `work` with lam_t = C_t g_t + exp(step A)_{t+1} lam_{t+1}.

    `adjoint` is the second term at the tile's last step, and becomes that of the tile before.
    """
    n = len(g)
    torch.mul(tile.C[..., None], g[:, :, None], out=work.whole[:n])
    lam = work.steps[n - 1].add_(adjoint)
    for t in reversed(range(n - 1)):
        lam = work.steps[t].addcmul_(decay.steps[t + 1], lam)
    torch.mul(decay.steps[0], lam, out=adjoint)


def _exponent_gradient(lam: Tensor, h: Tensor, decay: _Buffer, hs: _Buffer) -> Tensor:
    """lam_t exp(step A)_t h_{t-1}, (S, B, N, D), the gradient of step A; in the place of lam."""
    n = len(lam)
    lam *= decay.whole[:n]
    lam[0] *= h
    lam[1:] *= hs.whole[: n - 1]
    return lam
