"""Every shipped task file builds what it names, reading no data."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import tasks
from tasks.base import Task

FOLDER = Path(tasks.__file__).parents[1] / "conf" / "task"


def build(name: str) -> Task:
    found = OmegaConf.load(FOLDER / f"{name}.yaml")
    assert isinstance(found, DictConfig)
    found.pop("defaults", None)
    whole = found if "task" in found else OmegaConf.create({"task": found})
    rest = {"data": {"root": None, "cache": None}, "files": ["*.txt"]}
    return instantiate(OmegaConf.merge(whole, rest).task)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_it_builds(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    task = build(name)
    assert task.kind in ("text", "recall")
    assert task.recipe.warmup_steps < task.recipe.max_steps
    assert task.max_vocab > 0
    assert list(tmp_path.iterdir()) == []


def test_the_default_task_is_one_pass_over_its_curriculum():
    task = build("mqar")
    task.prepare()
    examples = task.facts()["splits"]["train"]["examples"]
    assert examples == task.recipe.batch_size * task.recipe.max_steps
    assert task.shuffle is False
    slices = task.facts()["splits"]["test"]["slices"]
    assert {each["num_kv_pairs"] for each in slices} == {2, 4, 8}
