"""Choosing warps and stages by measurement, with the interpreter in the place of a GPU."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels import autotune, launch
from kernels.autotune import STAGES, WARPS, autotuned
from kernels.rms_norm import rms_norm


def normalised(rows: int) -> torch.Tensor:
    torch.manual_seed(0)
    return rms_norm(torch.randn(rows, 24), torch.randn(24), backend="triton")


class Clock:
    """Has a launch take `times[warps, stages]`, 9 where that is not said."""

    def __init__(self, times):
        self.times, self.tried = times, []

    def __call__(self, run):
        run()
        return self.times.get(self.tried[-1], 9.0)

    def watch(self, monkeypatch):
        def launcher(kernel, grid, args, settings):
            self.tried.append((settings["num_warps"], settings["num_stages"]))
            launch.launch_plainly(kernel, grid, args, settings)

        monkeypatch.setattr(autotune, "launch_plainly", launcher)
        return self


def test_the_fastest_is_measured_once_and_stays(monkeypatch):
    clock = Clock({(8, 3): 1.0, (2, 1): 2.0}).watch(monkeypatch)
    with autotuned(timer=clock) as choices:
        y = normalised(5)
        assert sorted(clock.tried[:-1]) == sorted((w, s) for w in WARPS for s in STAGES)
        assert clock.tried[-1] == (8, 3)
        tried = len(clock.tried)
        assert torch.equal(normalised(5), y)
        assert clock.tried[tried:] == [(8, 3)]
    assert list(choices.values()) == [[8, 3]]
    torch.testing.assert_close(y, rms_norm(*_inputs(5), backend="reference"))
    tried = len(clock.tried)
    normalised(5)
    assert len(clock.tried) == tried, "behind the block kernels have their fixed settings"


def _inputs(rows):
    torch.manual_seed(0)
    return torch.randn(rows, 24), torch.randn(24)


def test_each_shape_has_a_choice_of_its_own_and_earlier_ones_are_kept(monkeypatch):
    with autotuned(timer=Clock({(4, 1): 1.0}).watch(monkeypatch)) as choices:
        normalised(5)
    again = Clock({(2, 2): 1.0}).watch(monkeypatch)
    with autotuned(dict(choices), again) as more:
        normalised(5)
        assert again.tried == [(4, 1)]
        normalised(70)
    assert [*more.values()] == [[4, 1], [2, 2]]


def test_the_fixed_settings_stay_where_nothing_is_faster(monkeypatch):
    fixed = []
    with launch.launching_through(
        lambda kernel, grid, args, s: fixed.append([s["num_warps"], s["num_stages"]])
    ):
        normalised(5)
    with autotuned(timer=Clock({}).watch(monkeypatch)) as choices:
        normalised(5)
    assert [*choices.values()] == fixed


def test_settings_that_a_gpu_has_no_room_for_are_passed_over(monkeypatch):
    clock = Clock({}).watch(monkeypatch)

    def timer(run):
        result = clock(run)
        if clock.tried[-1] != (8, 1):
            raise OutOfResources(300_000, 232_448, "shared memory")
        return result

    with autotuned(timer=timer) as choices:
        normalised(5)
    assert [*choices.values()] == [[8, 1]]


def test_trials_leave_what_a_kernel_is_given_alone(monkeypatch):
    """The gradient of the cross entropy takes the place of its logits."""
    from kernels.linear_cross_entropy import linear_cross_entropy

    x, weight = torch.randn(7, 12, requires_grad=True), torch.randn(33, 12)
    targets = torch.arange(7)
    with autotuned(timer=Clock({}).watch(monkeypatch)):
        got = torch.autograd.grad(linear_cross_entropy(x, weight, targets, backend="triton"), x)
    loss = linear_cross_entropy(x, weight, targets, backend="reference")
    torch.testing.assert_close(got, torch.autograd.grad(loss, x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(RuntimeError, match="there is no GPU to measure on"), autotuned():
        pass
