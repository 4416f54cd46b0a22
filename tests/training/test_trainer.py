"""What a process is set to before it trains."""

from collections.abc import Iterator

import pytest
import torch

from kernels.precision import has_amx
from schema.compose import compose
from training.trainer import set_up_process


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_threads_are_those_asked_for() -> None:
    set_up_process(compose("config", ["trainer.threads=3"]))
    assert torch.get_num_threads() == 3
    set_up_process(compose("config"))
    assert torch.get_num_threads() == 3  # null leaves them alone


def test_the_fast_precision_is_the_machines_and_is_on_record() -> None:
    cfg = compose("config", ["trainer=cpu_fast"])
    assert cfg.trainer.precision == "auto"
    set_up_process(cfg)
    assert cfg.trainer.precision == ("bf16" if has_amx() else "fp32")
