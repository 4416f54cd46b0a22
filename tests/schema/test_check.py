"""What is wrong with a composed configuration, told in one line before any data is read."""

import copy

import pytest
import torch
from omegaconf import OmegaConf

from layers.conv import GatedConv
from records.folder import RunFolder
from schema.check import check, check_here
from schema.compose import compose
from schema.errors import ConfigError


class Deaf(GatedConv):
    supports_segments = False


@pytest.fixture(scope="module")
def default():
    return compose()


@pytest.fixture(scope="module")
def text():
    return compose("config", ["task=text"])


@pytest.fixture(scope="module")
def evaluation():
    return compose("eval", ["run=somewhere"])


def changed(cfg, **values):
    cfg = copy.deepcopy(cfg)
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def said(cfg, config_name="config", check=check):
    arguments = (cfg, config_name) if check is not check_here else (cfg,)
    with pytest.raises(ConfigError) as error:
        check(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_shipped_defaults_are_right(default, evaluation):
    check(default)
    check_here(default)
    check(evaluation, "eval")


TYPES = [
    ("model.num_layers", "four", "model.num_layers='four' (str): expected int"),
    ("model.dropout", 1.5, "model.dropout=1.5 (float): expected float from 0 to 1"),
    ("trainer.accumulate", 0, "trainer.accumulate=0 (int): expected int of at least 1"),
    ("trainer.precision", "bf61", "trainer.precision='bf61' (str): expected one of 'fp32', 'bf16'"),
    ("optimizer.lr", "fast", "optimizer.lr='fast' (str): expected float"),
    ("seed", 1.5, "seed=1.5 (float): expected int"),
    ("compile", 1, "compile=1 (int): expected bool"),
    ("foo", 1, "foo=1: unknown key; allowed: budget, "),
    (
        "mixers.hedgehog.activation",
        "softmx",
        "mixers.hedgehog.activation='softmx' (str): expected one of 'softmax', ",
    ),
    (
        "mixers.hedgehog.feature_dmi",
        32,
        "mixers.hedgehog.feature_dmi=32: unknown key; did you mean feature_dim? allowed: ",
    ),
    ("mixers.hedgehog", 3, "mixers.hedgehog=3 (int): expected a mapping with _target_"),
    ("norm", {"_target_": None}, "norm=null (null): expected a mapping with _target_"),
    ("callbacks.mine", 3, "callbacks.mine=3 (int): expected a mapping with _target_"),
    ("task.train", 5, "task.train=5 (int): expected a list, each item a mapping"),
    ("objective._target_", "training.objectives.NextTokn", "objective._target_='training.obj"),
    ("seed", "???", "seed: missing; give seed=..."),
    ("model.d_model", "${nope}", "mixers.attention.d_model: Interpolation key 'nope' not found"),
    ("trainer.max_steps", None, "trainer.max_steps=null (null): expected int of at least 1"),
]


@pytest.mark.parametrize(("key", "value", "line"), TYPES, ids=[key for key, _, _ in TYPES])
def test_values_that_do_not_fit(default, key, value, line):
    assert said(changed(default, **{key: value})).startswith(line)


COMBINATIONS = [
    (
        {"pattern": "hedghog"},
        "pattern=hedghog: no mixer 'hedghog'; did you mean hedgehog? allowed: attention, ",
    ),
    ({"pattern": ["conv"] * 3}, "pattern=['conv', 'conv', 'conv']: expected 1 to model.num_layers"),
    ({"pattern": []}, "pattern=[]: expected 1 to model.num_layers=2 names"),
    ({"model.num_heads": 7}, "mixers.attention: num_heads=7: "),
    (
        {"model.num_heads": 7, "pattern": "hedgehog", "projection_in": "channel_mixers"},
        "mixers.hedgehog: num_heads=7: ",
    ),
    ({"optimizer.lr": -1.0}, "optimizer.lr=-1.0: allowed: above 0"),
    ({"scheduler.warmup_steps": 10**6}, "scheduler.warmup_steps=1000000: allowed: 0 to "),
    ({"task.recipe.batch_size": 0}, "task.recipe.batch_size=0: expected at least 1"),
    ({"task.vocab_size": 3}, "task.train[0]: vocab_size=3: expected more than seq_len="),
]


@pytest.mark.parametrize(("values", "line"), COMBINATIONS, ids=[str(v) for v, _ in COMBINATIONS])
def test_combinations_that_cannot_be(default, values, line):
    assert said(changed(default, **values)).startswith(line)


def test_options_of_a_mixer_outside_the_pattern_are_typed_but_it_is_not_built(default):
    check(changed(default, mixers__hedgehog__num_heads=7))
    assert "expected int" in said(changed(default, mixers__hedgehog__num_heads="7"))


def test_documents_need_mixers_that_keep_them_apart(text):
    """A mixer that cannot is stood in for by one whose class says so."""
    deaf = {"_target_": f"{__name__}.Deaf", "d_model": 256}
    cfg = changed(text, mixers__deaf=deaf, pattern="deaf")
    cfg.task.corpus.files = [__file__]
    assert said(cfg).startswith("task.documents='separate': ")
    cfg.task.documents = "concatenated"
    check(cfg)


def test_a_resumed_run_is_not_what_the_command_line_composes_to(default):
    longer = changed(default, trainer__max_steps=8)  # than the four steps that the run had
    assert said(longer).startswith("scheduler.warmup_steps=")
    check(changed(longer, resume="somewhere"))
    assert "expected int" in said(changed(default, resume="somewhere", trainer__max_steps="8"))


def test_evaluation(evaluation):
    line = said(changed(evaluation, eval__window=4, eval__stride=5), "eval")
    assert line == "eval.stride=5: allowed: up to eval.window=4"
    line = said(changed(evaluation, eval__window="doc"), "eval")
    assert line.startswith("eval.window='doc' (str): expected int or one of 'train', 'document'")
    assert said(compose("eval"), "eval") == "run: missing; give run=..."


def test_folders_that_are_not_there_or_hold_something(default, evaluation, tmp_path):
    absent = tmp_path / "absent"
    for cfg, key in ((default, "resume"), (evaluation, "run")):
        line = said(changed(cfg, **{key: str(absent)}), check=check_here)
        assert line.startswith(f"{key}={absent}: there is no such folder")
        line = said(changed(cfg, **{key: str(tmp_path)}), check=check_here)
        assert line.startswith(f"{key}={tmp_path}: no run folder")
    RunFolder.create(tmp_path, default, {})
    line = said(changed(default, run_dir=str(tmp_path)), check=check_here)
    assert line.startswith(f"run_dir={tmp_path} holds a run already")


def test_data_that_is_not_there(text, monkeypatch, tmp_path):
    absent = tmp_path / "absent.txt"
    assert str(absent) in said(changed(text, task__corpus__files=[str(absent)]), check=check_here)
    monkeypatch.delenv("SEQMIX_DATA", raising=False)
    cfg = compose("config", ["task=wikitext_small", f"data.root={tmp_path}"])
    assert str(tmp_path) in said(cfg, check=check_here)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(default, evaluation):
    line = said(changed(default, trainer__accelerator="gpu"), check=check_here)
    assert line.startswith("trainer.accelerator='gpu' with 1 devices: this machine has 0")
    assert said(changed(evaluation, accelerator="gpu", run=None), check=check_here).startswith(
        "accelerator='gpu' with 1 devices: this machine has 0"
    )
