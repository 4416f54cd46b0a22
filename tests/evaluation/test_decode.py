"""Decoding speed over context: what is measured, and what it is beside."""

from statistics import median

import pytest
import torch

from evaluation.decode import decode_speeds, plot_speeds, print_speeds
from layers.state import state_nbytes
from models.build import build_model
from schema.compose import compose
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


@pytest.fixture
def one_thread():
    """One row's step is too small to be worth the start of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_bounded_state_decodes_as_fast_behind_any_context(one_thread):
    """Tokens/s behind 1k and 64k within 10%; from 4k on more of them than attention's."""
    size = ("task=stdlib", "model=tiny")
    models = {
        pattern: build_model(compose("config", [*size, f"pattern={pattern}"]), 1000)
        for pattern in ("mamba", "hedgehog", "attention")
    }
    bounded = {name: models[name] for name in ("mamba", "hedgehog")}
    ratios: dict[str, list[float]] = {name: [] for name in bounded}
    for _ in range(3):
        speed = speeds(decode_speeds(bounded, [1024, 65536], tokens=64))
        for name in bounded:
            ratios[name].append(speed[name, 65536] / speed[name, 1024])
    for name, found in ratios.items():
        assert 0.9 < median(found) < 1.1, (name, found)
    speed = speeds(decode_speeds(models, [4096, 16384], tokens=64))
    for context in (4096, 16384):
        for name in bounded:
            assert speed[name, context] > speed["attention", context], (name, context, speed)


def speeds(result: dict) -> dict[tuple[str, int], float]:
    return {(r["model"], r["context"]): r["tokens_per_second"] for r in result["rows"]}
