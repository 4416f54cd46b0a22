"""The adapter to lm-evaluation-harness, on tasks and texts of our own."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from evaluation import Settings, evaluate
from models.generation import generate
from schema.errors import ConfigError
from tests.tasks.corpora import small_task
from tests.tiny import tiny_model

pytest.importorskip("lm_eval")

from evaluation.harness import OWN_TASKS, HarnessSettings, run_harness
from evaluation.lm_eval_adapter import SeqmixLM, pad_left
from evaluation.lm_eval_tasks import prompts

QUIET = Settings(samples=0, cost=False, protocol="carried")
PERPLEXITY = """
task: own_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
process_results: !function words.per_word
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
WORDS = '''
def per_word(doc, results):
    """The official words: ends of lines count, and bytes are of UTF-8."""
    text = doc["text"]
    words = len(text.split()) + text.count("\\n")
    size = len(text.encode())
    return {"word_perplexity": (results[0], words), "bits_per_byte": (results[0], size)}
'''
CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["cat", "log"]
doc_to_target: 0
"""


def made(tmp_path, kind: str = "bytes", pattern="linear_attention", **options):
    task = small_task(tmp_path, tokenizer=kind, seq_len=8)
    task.prepare()
    model = tiny_model(pattern, vocab_size=task.vocab_size).eval()
    return task, model, SeqmixLM(model, task.store.tokenizer, **options)


def requests(*args):
    return [SimpleNamespace(args=each) for each in args]


def texts_of(task) -> list[str]:
    return [piece.text for piece in task.corpus.read("test")]


def rows(folder, name: str, template: str, data: list[dict]) -> None:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    (folder / f"{name}.yaml").write_text(template.format(data=path, cache=folder / "cache"))


@pytest.mark.parametrize("kind", ["word", "bytes"])
def test_perplexity_is_that_of_eval(tmp_path, kind):
    """Same tokens, same contexts: each document from its first token on, all of it in reach."""
    task, model, _ = made(tmp_path, kind, ["attention", "mamba"])
    folder = tmp_path / "own"
    folder.mkdir()
    rows(folder, "own_perplexity", PERPLEXITY, [{"text": text} for text in texts_of(task)])
    (folder / "words.py").write_text(WORDS)
    settings = HarnessSettings(("own_perplexity",), str(folder), batch_size=2)
    found = run_harness(model, task.store.tokenizer, settings)["results"]["own_perplexity"]
    expected = evaluate(model, task, "test", QUIET)["protocols"]["carried"]
    for name in ("word_perplexity", "bits_per_byte"):
        # the same sums of the same terms: what is left is the order of documents
        assert found[f"{name},none"] == pytest.approx(expected[name], rel=1e-9)


def test_choices_are_scored_by_a_plain_loop(tmp_path):
    task, model, lm = made(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    questions = ["the", "a dog sat on the mat and the cat", "on"]
    rows(folder, "own_choice", CHOICE, [{"question": q} for q in questions])
    settings = HarnessSettings(("own_choice",), str(folder))
    found = run_harness(model, task.store.tokenizer, settings)["results"]["own_choice"]
    right = 0
    for question in questions:
        by_hand = [_nats(model, task, question, f" {word}") for word in ("cat", "log")]
        ours = lm.loglikelihood(requests((question, " cat"), (question, " log")), disable_tqdm=True)
        # fp32 sums of ten terms of about 10, padded and not
        assert [nats for nats, _ in ours] == pytest.approx(by_hand, abs=1e-4)
        right += by_hand[0] > by_hand[1]
    assert found["acc,none"] == pytest.approx(right / len(questions))


def _nats(model, task, context: str, continuation: str) -> float:
    ids = torch.tensor([[task.bos, *task.encode(context + continuation)]])
    with torch.no_grad():
        logs = model(ids[:, :-1])[0].log_softmax(-1)[0]
    n = len(task.encode(continuation))
    return float(logs.gather(1, ids[0, 1:, None])[-n:].sum())


@pytest.mark.parametrize("pattern", ["attention", ["conv", "mamba"]])
def test_a_batch_of_unlike_lengths_generates_what_each_row_does_alone(tmp_path, pattern):
    task, model, lm = made(tmp_path, pattern=pattern, batch_size=3)
    prompts = ["a", "the cat sat on", "the dog sat\non"]
    options = {"until": [], "max_gen_toks": 12}
    texts = lm.generate_until(requests(*((p, options) for p in prompts)))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([[task.bos, *task.encode(prompt)]])
        alone = generate(model, ids, max_new_tokens=12, stop_token=task.bos)[0]
        assert text == task.decode(alone.numpy())


def test_generation_ends_before_the_first_of_its_ends(tmp_path):
    _, _, lm = made(tmp_path)
    (whole,) = lm.generate_until(requests(("a", {"until": [], "max_gen_toks": 20})))
    end = whole[7]
    assert end  # what stands there ends it, wherever it comes up first
    (text,) = lm.generate_until(requests(("a", {"until": [end], "max_gen_toks": 20})))
    assert text == whole.split(end)[0]


def test_the_end_of_a_line_is_one_for_words_too(tmp_path):
    task, _, lm = made(tmp_path, "word")
    assert lm.tok_decode(task.encode("a cat\non a mat\n")) == "a cat\non a mat \n"


def test_windows_are_the_harness_s(tmp_path):
    """With a bound, a token's context is what get_rolling_token_windows gives it."""
    task, model, lm = made(tmp_path, max_length=5)
    text = texts_of(task)[0]
    (nats,) = lm.loglikelihood_rolling(requests((text,)))
    ids = [task.bos, *task.encode(text).tolist()]
    total, at = 0.0, 0
    with torch.no_grad():
        while at < len(ids) - 1:
            end = min(at + 5, len(ids) - 1)
            window = torch.tensor([ids[max(0, end - 5) : end + 1]])
            logs = model(window[:, :-1])[0].log_softmax(-1)[0]
            new = end - at
            total += float(logs.gather(1, window[0, 1:, None])[-new:].sum())
            at = end
    assert nats == pytest.approx(total, rel=1e-5)  # fp32 sums of 16 terms


def test_a_long_prompt_loses_its_beginning_and_is_counted(tmp_path):
    _, _, lm = made(tmp_path, max_length=12)
    options = {"until": [], "max_gen_toks": 4}
    long, short = lm.generate_until(requests(("the cat sat on", options), ("t sat on", options)))
    assert lm.truncated == 2  # the begin-of-document id is a token too
    assert long == short
    with pytest.raises(ConfigError, match=r"lm_eval\.max_length=12: expected more than the 12"):
        lm.generate_until(requests(("a", {"max_gen_toks": 12})))


def test_left_padding_ends_together():
    inputs, segments = pad_left([[1, 2, 3], [4]])
    assert inputs.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert segments is not None
    assert segments.tolist() == [[0, 0, 0], [-1, -1, 0]]
    assert pad_left([[1], [2]])[1] is None


def test_what_cannot_be_is_one_line(tmp_path):
    task, model, lm = made(tmp_path)
    with pytest.raises(ConfigError, match=r"lm_eval\.include_path=.*: no such folder"):
        run_harness(model, task.store.tokenizer, HarnessSettings(("x",), str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"lm_eval\.limit=0: expected at least 1"):
        HarnessSettings(("x",), limit=0)
    with pytest.raises(ConfigError, match=r"generation_kwargs\.num_beams: unknown"):
        lm.generate_until(requests(("a", {"num_beams": 2})))
    with pytest.raises(ConfigError, match="vocabulary of 31 ids, the tokeniser of 257"):
        SeqmixLM(tiny_model("attention"), task.store.tokenizer)
    bounded = tiny_model("hyena", vocab_size=task.vocab_size)
    bounded.mixers[0].max_len, bounded.mixers[0].beyond = 8, "refuse"
    with pytest.raises(ConfigError, match="this model reads 8 at most"):
        SeqmixLM(bounded, task.store.tokenizer).generate_until(requests(("a b c d e", {})))


@pytest.mark.slow  # reads the harness's index of thousands of tasks
def test_an_unknown_task_is_answered_with_the_nearest(tmp_path):
    task, model, _ = made(tmp_path)
    with pytest.raises(ConfigError, match=r"lm_eval\.tasks=fdaa: no such task; did you mean fda"):
        run_harness(model, task.store.tokenizer, HarnessSettings(("fdaa",)))


TWICE = """
include: {own}/seqmix_fda_twice.yaml
task: local_twice
dataset_path: json
dataset_kwargs: {{{{data_files: {{{{validation: {{data}}}}}}, cache_dir: {{cache}}}}}}
"""


def test_our_prompts_run_on_local_data(tmp_path):
    task, model, _ = made(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    data = [{"text": "A cat sat. Place: mat. Colour: red\nplace:", "key": "place", "value": "mat"}]
    data.append({"text": "nothing", "key": "x", "value": "y"})  # too short an answer
    rows(folder, "local_twice", TWICE.format(own=OWN_TASKS), data)
    found = run_harness(model, task.store.tokenizer, HarnessSettings(("local_twice",), str(folder)))
    assert found["results"]["local_twice"]["contains,none"] in (0.0, 1.0)
    assert found["samples"]["local_twice"]["effective"] == 1


def test_prompts_are_the_paper_s():
    doc = {"text": "A cat sat.\nplace:", "key": "place", "value": "mat"}
    assert prompts.pair_once(doc) == "A cat sat. Place:"
    assert prompts.pair_twice(doc) == "Information about Place. A cat sat.\nA cat sat. Place:"
    cloze = {"question": "Who? ", "context": " A cat.", "text": "A cat. It was a", "value": "cat"}
    assert prompts.cloze_once(cloze) == "A cat. It was a"
    assert prompts.cloze_twice(cloze) == "Who? A cat.\nA cat. It was a"
    assert prompts.contains(cloze, ["the CAT sat"]) == {"contains": 1.0}
    assert prompts.contains(cloze, ["a dog"]) == {"contains": 0.0}


@pytest.mark.parametrize("place", [0, 7, 50, 98, 99])
def test_a_document_is_cut_around_its_answer(place):
    words = [f"w{i}" for i in range(100)]
    words[place] = "answer"
    text = " \n".join(words)
    cut = prompts.crop(text, ("never there", "ANSWER"), words=10)
    assert "answer" in cut.split()
    assert len(cut.split()) == 10
    assert cut in text
    assert prompts.crop(text, ("answer",), words=100) == text


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "evaluation.lm_eval_adapter")
    with pytest.raises(ConfigError, match=r'lm_eval\.tasks: .* pip install "seqmix\[eval\]"'):
        importlib.import_module("evaluation.lm_eval_adapter")
