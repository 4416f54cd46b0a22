"""A corpus of WikiText-103's size is tokenised in bounded memory."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SIZE = 540_000_000  # bytes of WikiText-103
GIB = 1 << 30

PREPARE = """
import json, sys
from tasks.base import Recipe
from tasks.text.files import TextFiles
from tasks.text.task import LanguageModelling
from tasks.text.wikitext import WikiText

kind, folder, tokenizer = sys.argv[1:]
corpus = TextFiles([folder + "/text.txt"]) if kind == "text" else WikiText("wikitext-103", folder)
task = LanguageModelling(
    corpus, Recipe(1, 1, 1.0), tokenizer=tokenizer, bpe_vocab_size=8192, cache=folder + "/cache"
)
task.prepare()
# Of this program alone: ru_maxrss would begin with what the process had that started it.
(peak,) = (int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "VmHWM" in line)
print(json.dumps({"peak": peak, **task.facts()["splits"]["train"]}))
"""


def write_made_up(path: Path, size: int, *, headings: bool) -> None:
    """Articles of words with frequencies like a language's, each with names of its own.

    The names make half a million different words in all, as WikiText-103 has before the rare ones
    are replaced.
    """
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(50_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    lines = [f" {' '.join(rng.choices(words, weights, k=40))} . \n" for _ in range(12_000)]
    with path.open("w", encoding="utf-8", newline="") as file:
        written = number = 0
        while written < size:
            names = " ".join("".join(rng.choices(letters, k=9)) for _ in range(80))
            heading = f" \n = Title {number} = \n \n" if headings else ""
            written += file.write(f"{heading} {names} \n{''.join(rng.choices(lines, k=300))}")
            number += 1


@pytest.fixture(autouse=True)
def _linux():
    if not Path("/proc/self/status").exists():
        pytest.skip("reads a process's peak memory from /proc")


def prepare(kind: str, folder: Path, tokenizer: str) -> dict:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [sys.executable, "-c", PREPARE, kind, str(folder), tokenizer]
    made = subprocess.run(arguments, env=env, stdout=subprocess.PIPE, text=True, timeout=3000)
    assert made.returncode == 0
    return json.loads(made.stdout)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tokenizer", ["bpe", "word"])
def test_a_corpus_of_540_mb_takes_less_than_two_gib(tmp_path, tokenizer):
    (tmp_path / "wikitext-103").mkdir()
    for split, size in (("train", SIZE), ("valid", 10**6), ("test", 10**6)):
        path = tmp_path / "wikitext-103" / f"wiki.{split}.tokens"
        write_made_up(path, size, headings=True)
    facts = prepare("wikitext", tmp_path, tokenizer)
    assert facts["bytes"] >= SIZE
    assert facts["documents"] > 5000
    assert facts["peak"] < 2 * GIB


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_document_of_540_mb_takes_less_than_two_gib(tmp_path):
    write_made_up(tmp_path / "text.txt", SIZE, headings=False)
    facts = prepare("text", tmp_path, "bytes")
    assert facts["documents"] == 1
    assert facts["bytes"] > 0.89 * SIZE
    assert facts["peak"] < 2 * GIB
