"""What docs/mixers.md says of a mixer is measured on it."""

import pytest
import torch
from hydra.utils import instantiate

from benchmarks.mixers import HEADER, Outcomes, changed_share, rows
from schema.compose import compose


def mixer(name: str):
    torch.manual_seed(0)
    return instantiate(compose("config", ["model=tiny", "model.d_model=32"]).mixers[name])


@pytest.mark.parametrize("name", ["attention", "hyena", "jrt", "routing", "sea"])
def test_no_earlier_output_of_a_strict_mixer_changes(name):
    assert changed_share(mixer(name)) == 0


@pytest.mark.parametrize("name", ["routing_topw", "sea_bidirectional"])
def test_earlier_outputs_of_a_leaky_mixer_change(name):
    assert changed_share(mixer(name)) > 0.5


def test_a_row_has_what_the_header_names():
    (row,) = rows("tiny", Outcomes(["conv"]))
    facts = dict(zip(HEADER, row, strict=True))
    assert facts["mixer"] == "`conv`"
    assert facts["earlier outputs changed"] == "0.0%"
    assert facts["time, memory"] == "T^1, T^1"
    assert facts["state at 64k"] == "4.0 KiB"  # two columns of 512 floats and a number: of fp32
