"""Probes of recall in words: a text is continued, and the digits that come first are the answer."""

import re
from typing import Any

import numpy as np
import torch

from evaluation.continuations import batches, continue_tokens
from evaluation.limits import check_length
from evaluation.progress import Show
from evaluation.recall import SliceScore, pooled
from evaluation.settings import Settings
from evaluation.text import shown
from models.interface import TokenModel
from schema.errors import ConfigError
from tasks.probes import Probe, Question
from tasks.text.tokenizers import Tokenizer

ROOM = 8  # tokens that are generated beyond those of the answer: a space, dashes


@torch.no_grad()
def score_probe(
    model: TokenModel, tokenizer: Tokenizer, probe: Probe, settings: Settings, show: Show
) -> dict[str, Any]:
    """Accuracy per slice and group, greedy; what there is to know is shown `num_passes` times.

    Raises:
        ConfigError: another vocabulary, or a prompt longer than the model can read.
    """
    if model.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"the model has a vocabulary of {model.vocab_size} ids, "
            f"the tokeniser of {tokenizer.vocab_size}: expected the same"
        )
    questions = list(probe.questions())
    texts = [shown(each.context, each.question, settings.num_passes) for each in questions]
    prompts = [[tokenizer.bos, *ids.tolist()] for ids in tokenizer.encode_batch(texts)]
    answers = tokenizer.encode_batch([f" {each.answer}" for each in questions])
    room = max(len(ids) for ids in answers) + ROOM
    lengths = [len(ids) for ids in prompts]
    check_length(model, max(lengths) + room, f"probe={probe.name}, a prompt and its answer")
    right = np.zeros(len(questions), np.int64)
    with show(probe.name, len(questions)) as advance:
        for rows in batches(lengths, settings.batch_size, model.supports_segments):
            written = continue_tokens(
                model, tokenizer, [prompts[i] for i in rows], max_new_tokens=room
            )
            for i, text in zip(rows, written, strict=True):
                right[i] = digits_of(text) == questions[i].answer
            advance(len(rows))
    return _summary(model, questions, right, np.array(lengths))


def digits_of(text: str) -> str:
    """The number that a text begins with, without the dashes and spaces inside of it."""
    match = re.match(r"\s*(\d[\d -]*)", text)
    return re.sub(r"\D", "", match.group(1)) if match else ""


def _summary(
    model: TokenModel, questions: list[Question], right: np.ndarray, lengths: np.ndarray
) -> dict[str, Any]:
    names = list(dict.fromkeys(each.slice for each in questions))
    groups = list(dict.fromkeys(name for each in questions for name in each.groups))

    def score(name: str, chosen: list[int]) -> SliceScore:
        length = int(lengths[chosen].max())
        chance = float(np.mean([10.0 ** -len(questions[i].answer) for i in chosen]))
        ones = np.ones(len(chosen), np.int64)
        size = model.state_bytes(1, length)
        return SliceScore(name, chance, chance, right[chosen], ones, length, size)

    def members(name: str) -> list[int]:
        return [i for i, each in enumerate(questions) if name in (each.slice, *each.groups)]

    scores = [score(name, members(name)) for name in names]
    return {
        "guess": "naming a number of as many digits",
        "slices": [each.summary() for each in scores],
        "groups": [score(name, members(name)).summary() for name in groups],
        "all": pooled(scores).summary(),
    }
