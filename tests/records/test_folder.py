"""The run folder: made once, read back, never shared by two writers."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from records.folder import RunFolder, new_path
from records.machine import command, git_commit, machine, versions
from schema.errors import ConfigError


def make(path: Path) -> RunFolder:
    cfg = OmegaConf.create({"seed": 3, "steps": "${seed}"})
    return RunFolder.create(path, cfg, {"seed": 3})


def test_config_is_resolved_and_the_record_updated_in_place(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert "${" not in run.config_path.read_text()
    assert run.config() == OmegaConf.create({"seed": 3, "steps": 3})
    run.close("finished", steps=10)
    record = RunFolder.open(tmp_path / "run").record()
    assert record["status"] == "finished"
    assert (record["seed"], record["steps"]) == (3, 10)
    assert record["started"] <= record["finished"]


def test_a_folder_with_a_run_is_not_taken_again(tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already; resume="):
        make(tmp_path / "run")


@pytest.mark.parametrize("exists", [False, True])
def test_opening_what_is_no_run_says_so(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "nothing"
    if exists:
        path.mkdir()
    with pytest.raises(ConfigError, match="no config.yaml" if exists else "no such folder"):
        RunFolder.open(path)


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_path("mqar", "conv-attention", tmp_path), range(16)))
    assert len(set(made)) == 16
    assert all("_mqar_conv-attention" in path.name for path in made)


def test_a_name_with_slashes_stays_one_folder(tmp_path: Path) -> None:
    path = new_path("text/../../x", "a b", tmp_path)
    assert path.parent == tmp_path


def test_evaluations_are_kept_by_task(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    path = run.write_evaluation("mqar", {"accuracy": 0.1 + 0.2})
    assert path == tmp_path / "run" / "eval" / "mqar.json"
    assert run.evaluation("mqar") == {"accuracy": 0.1 + 0.2}
    assert run.evaluations() == ["mqar"]
    with pytest.raises(ConfigError, match="no evaluation of 'text'; evaluated: mqar"):
        run.evaluation("text")


HOLD_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_only_one_process_trains_a_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(run.path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process is training this run"):
            run.locked().__enter__()
    with run.locked():  # free again
        pass


def test_facts_of_the_machine_are_plain_values() -> None:
    facts = machine()
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] is None or facts["memory_bytes"] > 2**28
    assert {"python", "torch", "lightning"} <= versions().keys()
    assert command()
    commit = git_commit()
    assert commit is None or len(commit["commit"]) == 40
