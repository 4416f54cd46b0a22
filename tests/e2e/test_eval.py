"""eval.py on the folder of a run: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval import evaluate_run
from records.checkpoints import read_checkpoint, write_checkpoint
from records.folder import RunFolder
from schema.compose import compose
from schema.errors import ConfigError
from train import train

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model.d_model=16", "model.num_layers=2", "model.num_heads=1", "trainer.max_steps=4")
QUICK = ("eval.cost=false", "eval.samples=0", "eval.ar_hits=null", "accelerator=cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def texts(place) -> list[str]:
    options = []
    for name in ("own", "other"):
        path = place / f"{name}.txt"
        path.write_text("".join(f"{name} line {i} of a short text\n" for i in range(200)))
        options.append(f"task.corpus.files=[{path}]")
    return options


@pytest.fixture(scope="module")
def text_run(place, texts) -> Path:
    path = place / "text"
    options = (
        "task=text",
        texts[0],
        "task.tokenizer=bytes",
        "task.seq_len=32",
        "pattern=attention",
    )
    schedule = ("task.recipe.warmup_steps=1", f"data.cache={place / 'cache'}")
    train(compose("config", [*options, *schedule, *SMALL, f"run_dir={path}"]))
    return path


@pytest.fixture(scope="module")
def recall_run(place) -> Path:
    path = place / "recall"
    slices = "[{seq_len: 16, num_kv_pairs: 2, num_examples: 64}]"
    options = (f"task.train={slices}", f"task.test={slices}", "task.recipe.warmup_steps=1")
    train(compose("config", [*options, *SMALL, f"run_dir={path}"]))
    return path


def evaluated(run: Path, *options: str) -> dict:
    return evaluate_run(compose("eval", [f"run={run}", *QUICK, *options]))


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_prints_everything_and_writes_it(text_run, place):
    done = command(f"run={text_run}", "eval.max_new_tokens=5", "eval.prompt=own", cwd=place)
    assert done.returncode == 0, done.stderr
    for expected in ("windowed", "carried", "unigram", "sample 2", "words", "decode, tokens/s"):
        assert expected in done.stdout
    written = json.loads((text_run / "eval" / "text.json").read_text())
    assert written["prompt"] == "own"
    assert written["checkpoint"] == "step-00000004.ckpt"
    assert written["documents"][0]["nll"].keys() == {"windowed", "carried"}


def test_a_run_that_is_not_there_is_one_line_and_nothing_is_written(place):
    before = sorted(place.iterdir())
    done = command(f"run={place / 'nowhere'}", cwd=place)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "there is no such folder" in done.stderr
    assert sorted(place.iterdir()) == before


def test_training_and_eval_agree(text_run, recall_run):
    for run, name in ((text_run, "text"), (recall_run, "mqar")):
        by_training = RunFolder(run).evaluation(name)
        result = evaluated(run, "checkpoint=last")
        key = "documents" if name == "text" else "slices"
        assert result[key] == by_training[key]


def test_the_protocols_agree_when_a_window_is_a_document(text_run):
    result = evaluated(text_run, "eval.window=document", "eval.chunk=50")
    windowed, carried = (result["protocols"][p]["nll"] for p in ("windowed", "carried"))
    assert carried == pytest.approx(windowed, rel=1e-4)  # the bar that the protocols are held to


def test_a_model_that_reads_a_prefix_is_scored_behind_it(place, texts, capsys):
    """By train.py and by eval.py, unless told otherwise; a causal model on the same positions."""
    path = place / "prefix"
    text = ("task=text", texts[0], "task.tokenizer=bytes", "task.seq_len=32", "pattern=jrt")
    objective = ("objective=prefix_lm", "objective.prefix_len=8", "task.recipe.warmup_steps=1")
    where = (f"data.cache={place / 'cache'}", f"run_dir={path}")
    train(compose("config", [*text, *objective, *where, *SMALL]))
    assert "windowed: each window begins with 8 places that are read in both" in " ".join(
        capsys.readouterr().out.split()
    )
    assert "validation/token_perplexity" in RunFolder(path).metrics()[-1]
    windowed = RunFolder(path).evaluation("text")["protocols"]["windowed"]
    assert windowed["prefix"] == 8
    assert windowed["word_perplexity"] is None
    assert evaluated(path)["protocols"]["windowed"] == windowed
    assert evaluated(path, "eval.prefix=0")["protocols"]["windowed"]["tokens"] > windowed["tokens"]
    with pytest.raises(ConfigError, match=r"eval.prefix=32: allowed: less than eval.window=train"):
        evaluated(path, "eval.prefix=32")
    with pytest.raises(ConfigError, match=r"eval.stride=25: allowed: up to 24, eval.window=train"):
        evaluated(path, "eval.stride=25")


def test_another_task_and_split_have_files_of_their_own(text_run, texts):
    own = RunFolder(text_run)
    other = evaluated(text_run, "task=text", texts[1], "eval.protocol=carried")
    assert list(other["protocols"]) == ["carried"]
    assert other["text"] != evaluated(text_run)["text"]
    evaluated(text_run, "split=validation")
    assert {"text", "text_validation"} <= set(own.evaluations())


def test_a_checkpoint_may_be_a_file(text_run, recall_run):
    path = text_run / "checkpoints" / "step-00000004.ckpt"
    assert (
        evaluated(text_run, f"checkpoint={path}")["documents"] == evaluated(text_run)["documents"]
    )
    with pytest.raises(ConfigError, match=r"vocabulary of 257 ids; .* task=mqar, has 256"):
        evaluated(recall_run, f"checkpoint={path}")


def test_what_cannot_be_evaluated_is_one_line(text_run, recall_run, texts, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        ((text_run, "checkpoint=worst"), "checkpoint=worst: no such file; allowed: best, last"),
        ((tmp_path / "empty",), "no run folder, it has no config.yaml"),
        ((text_run, "task=mqar"), "vocabulary of 257 ids, task=mqar of 256"),
        (
            (recall_run, "task=text", texts[0]),
            "the run was trained on mqar, which has no tokeniser",
        ),
        ((text_run, "task=text", "task.corpus.files=[/nowhere.txt]"), "no file /nowhere.txt"),
    ]
    for (run, *options), message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            evaluated(run, *options)
        assert "\n" not in str(error.value)


def test_tasks_of_the_harness_run_by_name(text_run, recall_run, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "texts.jsonl").write_text('{"text": "own line 3"}\n')
    (tmp_path / "own.yaml").write_text(
        "task: own_bits\ndataset_path: json\noutput_type: loglikelihood_rolling\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/texts.jsonl}}, cache_dir: {tmp_path}}}\n"
        'test_split: test\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    options = ("lm_eval.tasks=[own_bits]", f"lm_eval.include_path={tmp_path}")
    found = evaluated(text_run, *options)
    assert 0 < found["results"]["own_bits"]["bits_per_byte,none"] < 16
    assert RunFolder(text_run).evaluation("lm_eval") == found
    with pytest.raises(ConfigError, match=r"lm_eval\.tasks: .* mqar, which has no tokeniser"):
        evaluated(recall_run, *options)


def test_a_damaged_checkpoint_is_named(text_run, tmp_path):
    path = tmp_path / "step-00000004.ckpt"
    write_checkpoint(path, read_checkpoint(text_run / "checkpoints" / path.name))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is damaged"):
        evaluated(text_run, f"checkpoint={path}")


def test_a_run_without_a_checkpoint_is_named(recall_run, tmp_path):
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).write_text((recall_run / name).read_text())
    with pytest.raises(ConfigError, match="no checkpoint in"):
        evaluated(tmp_path)


def test_bf16_says_so_and_is_close(text_run):
    exact, rounded = evaluated(text_run), evaluated(text_run, "precision=bf16")
    assert (exact["model"]["precision"], rounded["model"]["precision"]) == ("float32", "bfloat16")
    # bf16 keeps 8 bits: logits are off by up to 2^-8 of their size, the mean NLL by much less
    assert rounded["protocols"]["carried"]["nll"] == pytest.approx(
        exact["protocols"]["carried"]["nll"], rel=1e-2
    )
