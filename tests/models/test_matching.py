"""Matched sizes: within 1% of the reference, or refused with the nearest."""

import pytest
from omegaconf import DictConfig

from models.matching import Quantity, measure, resize
from schema.check import check
from schema.compose import compose
from schema.errors import ConfigError

SIZE = {"vocab_size": 64, "length": 32}
SMALL = ("model=tiny", "model.d_model=64", "model.num_heads=2", "model.num_layers=1")


def given(*overrides: str) -> DictConfig:
    cfg = compose("config", [*SMALL, *overrides])
    check(cfg)
    return cfg


@pytest.mark.parametrize("quantity", ["params", "flops"])
def test_the_hidden_width_makes_patterns_cost_the_same(quantity: Quantity) -> None:
    reference = measure(given("pattern=mamba2"), quantity, **SIZE)
    options = (f"match.quantity={quantity}", "match.to=mamba2", "match.key=channel_mixer.hidden")
    cfg = given("pattern=attention", *options)
    record = resize(cfg, **SIZE)
    assert record is not None
    assert record["target"] == reference
    assert cfg.channel_mixer.hidden == record["value"]
    assert measure(cfg, quantity, **SIZE) == record["cost"]
    assert abs(record["cost"] / reference - 1) <= 0.01


def test_the_width_follows_through_to_the_layers() -> None:
    wide = measure(given("pattern=mamba", "model.d_model=96"), "state", **SIZE)
    cfg = given("pattern=mamba", "match.quantity=state", f"match.to={wide}")
    record = resize(cfg, **SIZE)
    assert record is not None
    assert cfg.model.d_model == cfg.mixers.mamba.d_model == record["value"] == 96


def test_nothing_is_matched_unasked() -> None:
    assert resize(given("pattern=attention"), **SIZE) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["match.quantity=params"], "expected `to`"),
        (["match.quantity=params", "match.to=1000"], "the nearest is model.d_model=8 with"),
        (["match.quantity=params", "match.to=atention"], "atention"),
    ],
)
def test_what_cannot_be_matched(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resize(given("pattern=attention", *overrides), **SIZE)
