"""One token without gradients: the decode steps in Triton against the float64 references."""

import pytest
import torch

from kernels import linear_attention, selective_scan, ssd
from tests.kernels.compare import TOLERANCE, assert_close
from tests.kernels.guard import mutate

B, H, G, K, V, N = 2, 4, 2, 24, 70, 20
SEGMENTS = {"one document": None, "padding": torch.tensor([[-1], [3]])}


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def linear(backend, given, segments, normalize=True):
    q, k, v, S, z = given
    state = None if S is None else (S, z)
    options = {"initial_state": state, "return_state": True, "segments": segments}
    y, (S, z) = linear_attention(
        q, k, v, scale=0.5, normalize=normalize, backend=backend, **options
    )
    return y, S, z


def run_ssd(backend, given, segments):
    x, dt, A, B, C, D, z, S = given
    options = {"initial_states": S, "return_final_states": True, "segments": segments}
    return ssd(x, dt, -A, B, C, D=D, z=z, dt_softplus=True, backend=backend, **options)


def run_scan(backend, given, segments):
    u, delta, A, B, C, D, z, h = given
    options = {"initial_state": h, "return_last_state": True, "segments": segments}
    y, h = selective_scan(u, delta, -A, B, C, D, z, delta_softplus=True, backend=backend, **options)
    return y.transpose(1, 2), h


def linear_inputs(with_state):
    state = (rand(B, H, K, V), rand(B, H, K)) if with_state else (None, None)
    return [rand(B, 1, H, K), rand(B, 1, H, K), rand(B, 1, H, V), *state]


def ssd_inputs(with_state):
    S = rand(B, H, V, N) if with_state else None
    heads = [rand(B, 1, H, V), rand(B, 1, H), rand(H), rand(B, 1, G, N), rand(B, 1, G, N)]
    return [*heads, rand(H), rand(B, 1, H, V), S]


def scan_inputs(with_state):
    h = rand(B, V, N) if with_state else None
    shared = [rand(B, G, N, 1), rand(B, G, N, 1)]
    return [rand(B, V, 1), rand(B, V, 1), rand(V, N), *shared, rand(V), rand(B, V, 1), h]


STEPS = {
    "linear_attention": (linear, linear_inputs, "step"),
    "ssd": (run_ssd, ssd_inputs, "one_step"),
    "selective_scan": (run_scan, scan_inputs, "walk"),
}


def check(name, launched, with_state=True, segments=None, dtype=torch.float32, **options):
    """Output, where there is no padding, and state; by one launch."""
    torch.manual_seed(0)
    run, make, kernel = STEPS[name]
    given = [x if x is None else x.to(dtype) for x in make(with_state)]
    expected = run(
        "reference", [x if x is None else x.double() for x in given], segments, **options
    )
    with torch.no_grad():
        got = run("triton", given, segments, **options)
    assert launched == [kernel]
    valid = torch.ones(B, dtype=torch.bool) if segments is None else segments[:, 0] >= 0
    # The interpreter cuts bfloat16 off, see compare.assert_forms_agree.
    tolerance = TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 else 1)
    assert_close("y", got[0][valid], expected[0][valid], tolerance)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.dtype == torch.float32
        assert_close("state", a, b, tolerance)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_one_step(name, with_state, segments, guards):
    check(name, guards, with_state, segments)


@pytest.mark.parametrize("name", STEPS)
def test_in_bfloat16(name, guards):
    check(name, guards, dtype=torch.bfloat16)


def test_without_normaliser(guards):
    check("linear_attention", guards, normalize=False)


MUTANTS = {
    "linear_attention": ("E, total = k_1[:, None] * v_1[None], k_1",
                         "E, total = k_1[:, None] * v_1[None], k_1 * 0"),
    "ssd": ("group = bh // H * G + bh % H // (H // G)", "group = bh // H * G"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(monkeypatch, tmp_path, name, guards):
    mutate(monkeypatch, tmp_path, f"kernels.{name}.triton_step", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check(name, guards)
