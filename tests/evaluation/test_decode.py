"""Decoding speed over context: what is measured, and what it is beside."""

import pytest
import torch

from evaluation.decode import decode_speeds, plot_speeds, print_speeds
from layers.state import state_nbytes
from schema.errors import ConfigError
from tests.tiny import tiny_model


def test_every_model_is_timed_behind_every_context(tmp_path):
    models = {"mamba": tiny_model("mamba"), "attention": tiny_model("attention")}
    result = decode_speeds(models, [600, 8], tokens=3)
    assert [(r["model"], r["context"]) for r in result["rows"]] == [
        ("mamba", 8),
        ("attention", 8),
        ("mamba", 600),
        ("attention", 600),
    ]
    sizes = {(r["model"], r["context"]): r["state_bytes"] for r in result["rows"]}
    assert sizes["mamba", 8] == sizes["mamba", 600]
    assert sizes["attention", 8] < sizes["attention", 600]
    model = models["mamba"]
    with torch.no_grad():
        _, state = model.hidden(torch.zeros(1, 8, dtype=torch.int64), want_state=True)
    assert sizes["mamba", 8] == state_nbytes(state)
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])
    assert print_speeds(result).row_count == 2
    plot_speeds(result, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 1000
    assert model.training  # as it was


def test_a_context_beyond_what_a_model_reads_is_refused():
    model = tiny_model("hyena")
    for mixer in model.mixers:
        mixer.max_len, mixer.beyond = 32, "refuse"
    with pytest.raises(ConfigError, match="decode, hyena: 97 positions; this model reads 32"):
        decode_speeds({"hyena": model}, [64])
