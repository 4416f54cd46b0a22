"""Rotary positions: the equations of the paper, relative positions, precision."""

import math

import pytest
import torch

from layers.rotary import rotate, rotation


def test_each_pair_is_turned_by_its_own_angle():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 5], [7, 8, 100]])
    y = rotate(x, rotation(positions, 6, 100.0, x.dtype))
    for b in range(2):
        for t in range(3):
            for i in range(3):
                angle = positions[b, t].item() * 100.0 ** (-2 * i / 6)
                turn = torch.tensor(
                    [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
                    dtype=torch.float64,
                )
                expected = x[b, t][:, [i, i + 3]] @ turn.T
                torch.testing.assert_close(y[b, t][:, [i, i + 3]], expected, rtol=0, atol=1e-12)


def test_products_depend_on_distance_alone():
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)

    def product(here: int, there: int) -> float:
        by = [rotation(torch.tensor([t]), 8, dtype=q.dtype) for t in (here, there)]
        return (rotate(q, by[0]) * rotate(k, by[1])).sum().item()

    assert product(9, 4) == pytest.approx(product(1009, 1004), abs=1e-11)
    assert product(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-15)


def test_bfloat16_is_turned_in_float32():
    torch.manual_seed(2)
    x = torch.randn(1, 4, 1, 64).bfloat16()
    positions = torch.tensor([3, 1000, 30_000, 60_000])  # beyond what bfloat16 can count
    exact = rotate(x.double(), rotation(positions, 64, dtype=torch.float64))
    got = rotate(x, rotation(positions, 64, dtype=x.dtype))
    assert got.dtype is torch.bfloat16
    # One rounding to bfloat16 (2^-9) of the result, whose largest value is below 4.
    assert (got.double() - exact).abs().max() < 4 * 2**-8
