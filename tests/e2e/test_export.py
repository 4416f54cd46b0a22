"""export.py on the folder of a run, and what other programs then read."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.load import load
from export import export_run
from records.folder import RunFolder
from schema.compose import compose
from schema.errors import ConfigError
from train import train

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.d_model=16", "model.num_layers=2", "model.num_heads=1", "trainer.max_steps=2")
SENTENCES = ["own line 3 of a short text\n", "  own\tline, never 7 seen\n\n", "naïve 🐈 line\n"]


def text_run(folder: Path, tokenizer: str) -> Path:
    text = folder / "own.txt"
    text.write_text("".join(f"own line {i} of a short text\n" for i in range(200)))
    path = folder / "run"
    options = ("task=text", f"task.corpus.files=[{text}]", f"task.tokenizer={tokenizer}")
    more = ("task.seq_len=32", "task.recipe.warmup_steps=1", f"data.cache={folder / 'cache'}")
    train(compose("config", [*options, *more, *SMALL, "pattern=attention", f"run_dir={path}"]))
    return path


def exported(run: Path) -> Path:
    to = run.parent / "out"
    export_run(compose("export", [f"run={run}", f"to={to}"]))
    return to


@pytest.mark.parametrize("kind", ["word", "bytes"])
def test_a_run_survives(tmp_path, kind):
    run = text_run(tmp_path, kind)
    to = exported(run)
    folder = RunFolder.open(run)
    trained = load(folder, "last", folder.config(), torch.device("cpu"))
    own = trained.task.store.tokenizer
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(to)
    for text, ids in zip(SENTENCES, own.encode_batch(SENTENCES), strict=True):
        assert theirs(text)["input_ids"] == [own.bos, *ids.tolist()]
        assert theirs.decode(ids, skip_special_tokens=True) == own.decode(ids)
    tokens = np.concatenate([[own.bos], own.encode_batch(SENTENCES[:1])[0]])[None]
    with torch.no_grad():
        np.save(tmp_path / "logits.npy", trained.model.eval()(torch.from_numpy(tokens))[0].numpy())
    np.save(tmp_path / "tokens.npy", tokens)
    said = in_a_bare_process(
        f"""
        import sys, numpy as np, torch
        from models.exported import load_exported
        tokens = torch.from_numpy(np.load("{tmp_path}/tokens.npy"))
        with torch.no_grad():
            logits = load_exported("{to}")(tokens)[0].numpy()
        print((logits == np.load("{tmp_path}/logits.npy")).all())
        print([m for m in ("hydra", "lightning", "omegaconf", "transformers") if m in sys.modules])
        """
    )
    assert said.splitlines() == ["True", "[]"]


def in_a_bare_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_recall_run_has_no_tokenizer_and_a_full_folder_is_refused(tmp_path):
    run = tmp_path / "run"
    slices = "[{seq_len: 16, num_kv_pairs: 2, num_examples: 64}]"
    options = (f"task.train={slices}", f"task.test={slices}", "task.recipe.warmup_steps=1")
    train(compose("config", [*options, *SMALL, f"run_dir={run}"]))
    to = exported(run)
    assert sorted(path.name for path in to.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((to / "config.json").read_text())["trained_on"]["task"] == "mqar"
    with pytest.raises(ConfigError, match="expected a folder that is new or empty"):
        export_run(compose("export", [f"run={run}", f"to={to}"]))
