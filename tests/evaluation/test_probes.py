"""Probes in words: what is asked, and how an answer is read."""

import re
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from rich.console import Console

from evaluation import Settings
from evaluation.evaluate import probe
from evaluation.probes import ROOM, digits_of
from evaluation.text import shown
from models.generation import generate
from schema.compose import compose
from schema.errors import ConfigError
from tests.tasks.corpora import small_task
from tests.tiny import tiny_model


def made(name: str, *overrides: str):
    cfg = compose("eval", ["run=x", f"probe={name}", *overrides])
    return instantiate(cfg.probe, _convert_="all")


def test_a_passkey_stands_at_its_depth_and_is_asked_for():
    asked = made("passkey")
    questions = list(asked.questions())
    assert len(questions) == 3 * 5 * 10
    for each in questions:
        words, depth = map(int, re.findall(r"\d+", each.slice))
        assert each.context.count(f"The pass key is {each.answer}.") == 1
        before = each.context.split("The pass key is")[0].split()
        assert len(before) - len(asked.instruction.split()) == round(depth / 100 * words)
        assert 1 <= int(each.answer) <= 50000
        assert each.question.endswith("The pass key is")


def test_needles_say_one_number_for_each_key():
    for each in made("needle", "probe.samples=3").questions():
        said = dict(re.findall(r"The number of (\w+) is (\d+)\.", each.context))
        words, needles = map(int, re.findall(r"\d+", each.slice))
        assert len(said) == needles
        asked = re.fullmatch(r"The number of (\w+) is", each.question)
        assert asked
        assert said[asked[1]] == each.answer
        assert len(each.context.split()) == words + 6 * needles


def test_a_phone_book_answers_for_a_name_that_is_no_example():
    for each in made("phonebook", "probe.samples=5").questions():
        book = dict(re.findall(r"(\w+ \w+): ([\d-]+)", each.context))
        assert len(book) == int(each.slice[1:])
        *examples, asked = each.question.strip().split("\n")
        names = {line.split(":")[0] for line in examples}
        assert len(names) == 2
        assert all(line in each.context.split("\n") for line in examples)
        assert asked.removesuffix(":") not in names
        assert book[asked.removesuffix(":")].replace("-", "") == each.answer


@pytest.mark.parametrize("name", ["passkey", "needle", "phonebook"])
def test_questions_follow_from_the_seed(name):
    one, two, other = (list(made(name, f"probe.seed={s}").questions()) for s in (3, 3, 4))
    assert one == two
    assert one != other


@pytest.mark.parametrize(
    ("text", "digits"),
    [(" 123. More", "123"), ("123-456-7890\nx", "1234567890"), ("the 12", ""), ("", "")],
)
def test_the_number_that_a_text_begins_with(text, digits):
    assert digits_of(text) == digits


def test_answers_of_unlike_prompts_are_those_of_each_alone(tmp_path):
    """Batched with left padding; the model's own words of one question are made the answer."""
    task = small_task(tmp_path)
    task.prepare()
    model = tiny_model(["conv", "mamba"], vocab_size=task.vocab_size).eval()
    with torch.no_grad():  # an alphabet of digits and full stops, so that there are answers at all
        model.head.weight[[i for i in range(257) if chr(i) not in "0123456789."]] = 0.0
        model.head.weight[46:58] *= 2
    asked = made("phonebook", "probe.samples=3", "probe.entries=[3,5]")
    questions = list(asked.questions())
    for passes in (1, 2):
        texts = [shown(each.context, each.question, passes) for each in questions]
        prompts = [torch.tensor([[task.bos, *task.encode(text)]]) for text in texts]

        def alone(room: int, given=prompts) -> list[str]:
            options = {"max_new_tokens": room, "stop_token": task.bos}
            rows = [generate(model, ids, **options)[0] for ids in given]
            return [digits_of(task.decode(row.numpy())) for row in rows]

        told = [*alone(19)[:-1], "x"]  # the model's own words are what is right, but for one
        asked.questions = lambda said=told: (
            replace(each, answer=answer) for each, answer in zip(questions, said, strict=True)
        )
        room = max(map(len, told)) + 1 + ROOM
        right = [x == y for x, y in zip(alone(room), told, strict=True)]
        assert any(x and y for x, y in zip(right, told, strict=True))
        settings = Settings(num_passes=passes, batch_size=4)
        result = probe(model, asked, settings, task, console=Console(quiet=True))
        by_slice = [sum(right[:3]) / 3, sum(right[3:]) / 3]
        assert [row["exact_accuracy"] for row in result["slices"]] == pytest.approx(by_slice)


def test_what_cannot_be_asked_is_one_line(tmp_path):
    task = small_task(tmp_path)
    task.prepare()
    cases = [
        ("phonebook", "probe.entries=[2]", r"probe\.entries=2: expected 3 to 256"),
        ("needle", "probe.needles=[17]", r"probe\.needles=17: expected 1 to 16"),
        ("passkey", "probe.depths=[101]", r"probe\.depths=101: expected 0 to 100 percent"),
        ("passkey", "probe.statement=no place", r"probe\.statement='no place': expected {key}"),
        ("passkey", "probe.samples=0", r"probe\.samples=0: expected at least 1"),
    ]
    for name, override, message in cases:
        with pytest.raises(Exception, match=message):
            made(name, override)
    model = tiny_model("hyena", vocab_size=task.vocab_size)
    for mixer in model.mixers:
        mixer.max_len, mixer.beyond = 64, "refuse"
    with pytest.raises(ConfigError, match=r"probe=passkey_text.*; this model reads 64 at most"):
        probe(model, made("passkey"), Settings(), task, console=Console(quiet=True))
