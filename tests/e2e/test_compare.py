"""compare.py on runs that were really trained: what it prints, writes and refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.comparison import compare
from compare import run
from records.folder import RunFolder
from schema.check import check
from schema.compose import compose
from schema.errors import ConfigError
from tests.e2e.runs import TINY, train_here
from train import train

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("conv", "attention")
QUICK = ("trainer.max_steps=6", "trainer.validate_every=3", "trainer.checkpoint_every=6")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two patterns and two seeds on recall, and one pattern on text of twenty-four documents."""
    root = tmp_path_factory.mktemp("multirun")
    for pattern in PATTERNS:
        for seed in range(2):
            where = f"run_dir={root / 'mqar' / f'{pattern}_{seed}'}"
            train_here(*TINY, *QUICK, f"pattern={pattern}", f"seed={seed}", where)
    text = root / "text.txt"
    text.write_text("".join(f"document {i} of a text\n" * 9 + "=====\n" for i in range(24)))
    options = (
        "task=text",
        f"files=[{text}]",
        "task.corpus.separator='=====\n'",
        "task.corpus.test=0.5",
        "task.tokenizer=bytes",
        "task.seq_len=32",
        "model.d_model=16",
        "model.num_layers=1",
        "model.num_heads=1",
        "scheduler.warmup_steps=1",
        f"data.cache={root / '.cache'}",
    )
    for pattern in PATTERNS:
        for seed in range(2):
            where = f"run_dir={root / 'text' / f'{pattern}_{seed}'}"
            train(
                compose("config", [*options, *QUICK, f"pattern={pattern}", f"seed={seed}", where])
            )
    return root


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "compare.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_prints_the_table_the_answer_and_the_path(sweep):
    done = command("runs=mqar", "baseline=attention", cwd=sweep)
    assert done.returncode == 0, done.stderr
    for expected in (
        "accuracy",
        "minus attention",
        "At equal",
        "written to mqar/report/report.html",
    ):
        assert expected in " ".join(done.stdout.split())
    page = (sweep / "mqar" / "report" / "report.html").read_text()
    assert "python compare.py runs=mqar baseline=attention" in page
    assert (sweep / "mqar" / "report" / "figures" / "1_mqar_recall.svg").exists()


def test_the_numbers_are_those_of_the_runs(sweep):
    (found,) = compare([str(sweep / "mqar")]).sections
    for row in found.section.rows:
        runs = [RunFolder(sweep / "mqar" / f"{row.name}_{seed}") for seed in range(2)]
        values = [run.evaluation("mqar")["all"]["sequence_accuracy"] for run in runs]
        assert row.estimate is not None
        assert row.estimate.mean == pytest.approx(sum(values) / 2)
        assert row.chosen.outcomes[0].validation == runs[0].metrics()[-1]["validation/accuracy"]
        model = runs[0].record()["model"]
        assert row.costs.parameters == model["parameters"]
        assert row.costs.state_bytes == model["state_bytes"]
        assert row.costs.tokens == runs[0].record()["tokens"]
        assert row.costs.throughput is not None


def test_documents_of_a_text_are_paired(sweep):
    (found,) = compare([str(sweep / "text")]).sections
    (difference,) = found.differences
    assert difference.documents is not None
    assert difference.documents.n >= 10
    losses = [
        [
            (score := RunFolder(path).evaluation("text")["protocols"]["windowed"])["nll"]
            / score["tokens"]
            for path in sorted((sweep / "text").glob(f"{row.name}_*"))
        ]
        for row in (difference.a, difference.b)
    ]
    assert difference.documents.mean == pytest.approx(sum(losses[0]) / 2 - sum(losses[1]) / 2)


def test_what_cannot_be_compared_is_one_line_and_nothing_is_written(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(sweep)
    (tmp_path / "empty").mkdir()
    cases = [
        (("runs=nowhere",), "runs=nowhere: there is no such folder"),
        ((f"runs={tmp_path / 'empty'}",), "there is no run in it"),
        (("runs=mqar", "baseline=con", "out=new"), "baseline=con: no such row; did you mean conv"),
        (("runs=mqar", "interval=bca"), "expected one of 't', 'bootstrap'"),
        ((), "runs: missing; give runs=..."),
    ]
    for arguments, expected in cases:
        with pytest.raises(ConfigError) as error:
            cfg = compose("compare", arguments)
            check(cfg, "compare")
            run(cfg)
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
    assert not (sweep / "new").exists()
