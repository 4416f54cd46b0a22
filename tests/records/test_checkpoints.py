"""Checkpoints: checked when read, the newest good one found, old ones removed."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch

from records.checkpoints import (
    Best,
    CheckpointStore,
    DamagedCheckpoint,
    read_checkpoint,
    step_of,
    write_checkpoint,
)
from schema.errors import ConfigError


def store_with(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder / "checkpoints")
    for step in steps:
        write_checkpoint(store.path(step), {"step": step, "weights": torch.full((1000,), step)})
    return store


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = store_with(tmp_path, 300)
    assert store.path(300).name == "step-00000300.ckpt"
    assert step_of(store.path(300)) == 300
    checkpoint = read_checkpoint(store.path(300))
    assert checkpoint["step"] == 300
    assert torch.equal(checkpoint["weights"], torch.full((1000,), 300))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink], ids=["cut", "bit", "gone"])
def test_a_damaged_newest_is_passed_over_in_one_line(tmp_path: Path, damage) -> None:
    store = store_with(tmp_path, 100, 200)
    damage(store.path(200))
    said: list[str] = []
    assert store.newest(said.append) == store.path(100)
    if damage is not Path.unlink:
        assert len(said) == 1
        assert "step-00000200.ckpt is damaged" in said[0]
        with pytest.raises(DamagedCheckpoint):
            read_checkpoint(store.path(200))


def test_a_checkpoint_without_a_checksum_is_passed_over(tmp_path: Path) -> None:
    store = store_with(tmp_path, 100)
    store.path(100).with_name("step-00000100.ckpt.sha256").unlink()
    said: list[str] = []
    assert store.newest(said.append) is None
    assert "no checksum" in said[0]


def test_the_checksum_is_one_that_sha256sum_reads(tmp_path: Path) -> None:
    path = store_with(tmp_path, 7).path(7)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Path(f"{path}.sha256").read_text() == f"{digest}  {path.name}\n"


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3, 4, 5)
    store.mark_best(Best(2, "validation/loss", 0.5))
    (store.folder / ".step-00000006.ckpt.123.partial").write_bytes(b"left by a kill")
    store.prune(keep=2)
    assert store.steps() == [2, 4, 5]
    assert len(list(store.folder.iterdir())) == 2 * 3 + 1  # with checksums, and best.json
    assert store.best() == Best(2, "validation/loss", 0.5)


def test_going_on_from_an_earlier_step_forgets_the_later_ones(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3)
    store.mark_best(Best(3, "validation/loss", 0.5))
    store.forget_after(2)
    assert store.steps() == [1, 2]
    assert store.best() is None


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def test_reading_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "step-00000001.ckpt"
    write_checkpoint(path, {"trap": Malicious()})
    with pytest.raises(pickle.UnpicklingError):
        read_checkpoint(path)
    assert "code ran" not in capsys.readouterr().out


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step-00000009\.ckpt does not exist"):
        read_checkpoint(CheckpointStore(tmp_path).path(9))
    with pytest.raises(ConfigError, match=r"model\.pt is no checkpoint of a run"):
        step_of(Path("model.pt"))
