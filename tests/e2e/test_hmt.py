"""A model with segment memory through train.py and eval.py: nothing about it is a special case."""

from pathlib import Path

import pytest

from eval import evaluate_run
from records.folder import RunFolder
from schema.check import check
from schema.compose import compose
from schema.errors import ConfigError
from tests.e2e.runs import start, train_here, without_timing

STEPS = 6
MEMORY = (
    "memory=hmt",
    "memory.segment_len=8",
    "memory.sensory_len=2",
    "memory.max_memories=2",
    "memory.bptt_depth=3",
)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("text")
    text = place / "text.txt"
    # Documents of unlike length, which share sequences: 3 to 9 segments.
    text.write_text("".join(f"line {i} of a short text\n" + "\n" * (i % 5 == 0) for i in range(90)))
    return [
        "task=text",
        f"task.corpus.files=[{text}]",
        f"data.cache={place / 'cache'}",
        "task.tokenizer=bytes",
        "task.seq_len=48",
        "task.recipe.batch_size=4",
        "pattern=[conv,attention]",
        "model.d_model=16",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.dropout=0.1",
        "scheduler.warmup_steps=1",
        f"scheduler.total_steps={STEPS}",
        "trainer.log_every=1",
        "trainer.validate_every=3",
        "trainer.checkpoint_every=3",
        *MEMORY,
    ]


def command(*arguments: str) -> str:
    """train.py as a process of its own; what it prints."""
    process = start(*arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_it_trains_resumes_and_is_evaluated(options: list[str], tmp_path: Path) -> None:
    path, straight = tmp_path / "run", tmp_path / "straight"
    command(*options, f"run_dir={path}", "trainer.max_steps=3")
    said = command(f"resume={path}", f"trainer.max_steps={STEPS}")
    assert "step 3" in said
    train_here(*options, f"run_dir={straight}", f"trainer.max_steps={STEPS}")
    run, whole = RunFolder.open(path), RunFolder.open(straight)
    ours, theirs = without_timing(run), without_timing(whole)
    assert [row["train/loss"] for row in ours] == [row["train/loss"] for row in theirs]
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert run.evaluation("text")["documents"] == whole.evaluation("text")["documents"]
    assert run.record()["model"]["causal"] == "strict"

    result = evaluate_run(
        compose(
            "eval",
            [
                f"run={path}",
                "accelerator=cpu",
                "eval.window=document",
                "eval.chunk=13",
                "eval.samples=2",
                "eval.max_new_tokens=20",
                "eval.cost=false",
            ],
        )
    )
    windowed, carried = (result["protocols"][p]["nll"] for p in ("windowed", "carried"))
    assert carried == pytest.approx(windowed, rel=1e-4)  # the bar that the protocols are held to
    assert len(result["samples"]) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.segment_len=0", "memory: segment_len=0: expected at least 1"),
        ("memory.sensory_len=9", "memory: sensory_len=9: allowed: 0 to segment_len=8"),
        ("memory.summary_len=9", "memory: summary_len=9: allowed: 1 to segment_len=8"),
        ("memory.query=next", "memory.query='next' .* expected one of 'previous_tail'"),
        ("memory.segment_len=eight", "memory.segment_len='eight' .*: expected int"),
        ("memory.segment_length=8", "unknown key; did you mean segment_len"),
        ("memory=hmm", "memory=hmm: no such choice; did you mean hmt"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check(compose("config", [*options, override]))
    assert "\n" not in str(error.value)


def test_a_leak_is_told_in_the_record(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run"
    leaky = ("memory.query=current_prefix", "trainer.max_steps=1")
    train_here(*options, *leaky, f"run_dir={path}")
    facts = RunFolder.open(path).record()["model"]
    assert facts["causal"] == "leaky"
    assert "memory.query=current_prefix" in facts["leak_reason"]
