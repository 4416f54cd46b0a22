"""Commands: what they print, write and return, right and wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from schema.entry import command
from schema.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def main(cfg: DictConfig) -> None:
    """Stands in for training, which has its own tests, where only the command is looked at."""
    if cfg.seed == 13:
        raise ConfigError("seed=13: the data is not there")
    folder = Path(cfg.run_dir or "alone")
    folder.mkdir(exist_ok=True)
    (folder / f"seed{cfg.seed}").touch()


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs `main` as a command in an empty folder: (exit code, stderr, files written)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        code = 0
        try:
            command(main, "config")()
        except SystemExit as end:
            code = end.code
        files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("[!.]*") if p.is_file())
        return code, capfd.readouterr().err, files

    return run


def points_of(files: list[str]) -> list[str]:
    """What the points of a sweep wrote, in their folders' names without the hash at the end."""
    return [re.sub(r"-[0-9a-f]{8}/", "/", file) for file in files if file.count("/") == 2]


def test_a_single_run_is_all_that_is_written(run):
    assert run("seed=1") == (0, "", ["alone/seed1"])


def test_a_sweep_has_a_folder_for_each_point(run):
    code, said, files = run("-m", "seed=1,2", "hydra.sweep.dir=swept")
    assert (code, said) == (0, "")
    assert points_of(files) == ["swept/seed-1/seed1", "swept/seed-2/seed2"]


def test_a_group_can_make_a_sweep(run):
    files = run("sweep=seeds", "hydra.sweep.dir=swept")[2]
    assert points_of(files) == [f"swept/seed-{i}/seed{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["modle=tiny"], "error: modle=tiny: unknown key; did you mean model? "),
        (["model.num_layers=four"], "error: model.num_layers='four' (str): expected int"),
        (["pattern=hedghog"], "error: pattern=hedghog: no mixer 'hedghog'; did you mean hedgehog?"),
        (["resume=nowhere"], "error: resume=nowhere: there is no such folder"),
        (["seed=13"], "error: seed=13: the data is not there"),
        (["-m", "seed=1,2", "pattern=conv,hedghog"], "error: pattern=hedghog: no mixer"),
        (["seed=1,2"], "error: seed=1,2: several values; -m runs each of them"),
        (["--cfg", "job", "modle=tiny"], "error: modle=tiny: unknown key"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(run, arguments, line):
    code, said, files = run(*arguments)
    assert (code, files) == (2, [])
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_the_other_points_of_a_sweep_run(run):
    code, said, files = run("-m", "seed=1,13,2", "hydra.sweep.dir=swept")
    assert code == 2
    assert said.endswith("error: seed=13: the data is not there\n")
    assert points_of(files) == ["swept/seed-1/seed1", "swept/seed-2/seed2"]


def test_help_and_configuration_are_shown(run, capfd):
    assert run("--cfg", "job", "model=tiny")[::2] == (0, [])
    assert run("--help")[::2] == (0, [])
    assert run("--info", "defaults")[::2] == (0, [])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["train.py", "mixers.hedgehog.feature_dmi=32"],
            "error: mixers.hedgehog.feature_dmi=32: unknown key; did you mean feature_dim? allowed",
        ),
        (["eval.py"], "error: run: missing; give run=..."),
    ],
    ids=["train", "eval"],
)
def test_the_real_commands(arguments, line, tmp_path):
    script, *rest = arguments
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
