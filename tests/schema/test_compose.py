"""Command lines to configurations, and what is said about those that make none."""

import pytest
from omegaconf import OmegaConf

from schema.compose import CONF, compose, compose_all
from schema.errors import ConfigError

MIXERS = sorted(path.stem for path in (CONF / "mixer").glob("*.yaml"))


def test_every_mixer_is_there_without_being_named():
    cfg = compose("config", ["mixers.hedgehog.feature_dim=32"])
    assert sorted(cfg.mixers) == MIXERS
    assert cfg.mixers.hedgehog.feature_dim == 32
    assert "hydra" not in cfg


def test_a_mixer_can_be_there_twice_with_other_options():
    cfg = compose(
        "config",
        ["+mixer@mixers.narrow=sliding_window", "mixers.narrow.window=16", "pattern=narrow"],
    )
    assert cfg.mixers.narrow.window == 16
    assert cfg.mixers.sliding_window.window == 128


@pytest.mark.parametrize(
    ("overrides", "d_model", "channel_mixer"),
    [
        ([], 64, None),
        (["task=wikitext_small"], 256, "SwiGLU"),
        (["task=wikitext_small", "model=recall"], 64, None),
        (["task=wikitext_small", "model=small", "channel_mixer=gelu"], 512, "GELU"),
        (["model=tiny", "channel_mixer=none"], 256, None),
    ],
    ids=str,
)
def test_what_is_chosen_for_and_what_is_named(overrides, d_model, channel_mixer):
    """A text task chooses a size and a size its channel mixer, unless the command line does."""
    cfg = compose("config", overrides)
    assert cfg.model.d_model == d_model
    target = cfg.channel_mixer._target_
    assert (target and target.rpartition(".")[2]) == channel_mixer


WRONG = [
    ("task=wikitext13", "task=wikitext13: no such choice; did you mean wikitext103? allowed: "),
    ("model=null", "model=null: no such choice; allowed: 125m, 355m, recall, small, tiny"),
    ("modle=tiny", "modle=tiny: unknown key; did you mean model? allowed: budget, "),
    ("model.d_modl=3", "model.d_modl=3: unknown key; did you mean d_model? allowed: d_model, "),
    (
        "mixers.hedgehog.feature_dmi=32",
        "mixers.hedgehog.feature_dmi=32: unknown key; did you mean feature_dim? allowed: activ",
    ),
    (
        "mixers.hedghog.feature_dim=32",
        "mixers.hedghog.feature_dim=32: unknown key mixers.hedghog; did you mean hedgehog? allowed",
    ),
    ("model.d_model.x=3", "model.d_model.x=3: unknown key; allowed: nothing"),
    ("~nothing", "~nothing: unknown key; allowed: "),
    (
        "hydra/launcher=job",
        "hydra/launcher=job: no such choice; did you mean joblib? ",
    ),
    ("hydra.swep.dir=x", "hydra.swep.dir=x: unknown key hydra.swep; did you mean sweep? allowed"),
    ("model@other=tiny", "Could not override 'model@other'. "),
    ("pattern=[conv,", "'pattern=[conv,' cannot be read as an override: expected key=value; "),
    ("seed", "'seed' cannot be read as an override: expected key=value; "),
    ("=3", "'=3' cannot be read as an override: expected key=value; "),
]


@pytest.mark.parametrize(("override", "line"), WRONG, ids=[wrong for wrong, _ in WRONG])
def test_one_line_for_what_is_wrong(override, line):
    with pytest.raises(ConfigError) as error:
        compose("config", ["seed=1", override])
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_several_values_need_a_sweep():
    with pytest.raises(ConfigError, match=r"^seed=1,2: several values; -m runs each of them"):
        list(compose_all("config", ["seed=1,2"]))


def test_the_points_of_a_sweep():
    overrides = ["pattern=attention,[conv,hedgehog]", "seed=0,1", "model.dropout=0.5"]
    points = list(compose_all("config", overrides, multirun=True))
    assert [(OmegaConf.to_object(p)["pattern"], p.seed) for p in points] == [
        ("attention", 0),
        ("attention", 1),
        (["conv", "hedgehog"], 0),
        (["conv", "hedgehog"], 1),
    ]
    assert {point.model.dropout for point in points} == {0.5}


def test_a_wrong_choice_among_the_points():
    with pytest.raises(ConfigError, match=r"^model=tinny: no such choice; did you mean tiny"):
        list(compose_all("config", ["model=small,tinny"], multirun=True))


def test_evaluation_takes_no_other_network():
    with pytest.raises(ConfigError, match=r"^model=tiny: eval.py takes the network of the run"):
        list(compose_all("eval", ["run=somewhere", "task=stdlib", "model=tiny"]))
