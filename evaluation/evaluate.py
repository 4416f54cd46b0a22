"""Everything that is measured on a trained model and one task, as plain values."""

from typing import Any

import torch
from rich.console import Console

from evaluation.chosen import chosen_slices
from evaluation.cost import measure_cost
from evaluation.limits import check_length
from evaluation.probes import score_probe
from evaluation.progress import Show, bars
from evaluation.recall import SliceScore, pooled, score_slice
from evaluation.settings import Settings
from evaluation.text import check_lengths, prompt_text, read_text, sample, score_text
from models.interface import TokenModel
from schema.errors import ConfigError
from tasks.base import Split, Task
from tasks.probes import Probe
from tasks.recall.task import Recall
from tasks.text.task import LanguageModelling


def evaluate(
    model: TokenModel,
    task: Task,
    split: Split = "test",
    settings: Settings | None = None,
    *,
    trained_on: Task | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score `model` on a split of `task`; the result can be written as JSON.

    Args:
        settings: the defaults when None.
        trained_on: the task of the model's run, when it is another than `task`: its tokeniser
            encodes the text of `task`, of which no more than the split is read.
        console: shows progress, when it is a terminal; standard error when None.

    Raises:
        ConfigError: the model's vocabulary is not the task's, or the data is not there.
    """
    settings = settings or Settings()
    show = bars(console or Console(stderr=True))
    trained_on = trained_on or task
    result = {
        "task": task.name,
        "kind": task.kind,
        "split": split,
        "trained_on": trained_on.name,
        "note": "; ".join(dict.fromkeys(t.note for t in (task, trained_on) if t.note)),
        "model": _model_facts(model),
    }
    if isinstance(task, LanguageModelling):
        result |= _text(model, task, split, settings, trained_on, show)
    elif isinstance(task, Recall):
        result |= _recall(model, task, split, settings, show)
    else:
        raise TypeError(f"{type(task).__name__}: evaluation knows text and recall tasks")
    if settings.cost:
        result["cost"] = measure_cost(model)
    return result


def probe(
    model: TokenModel,
    asked: Probe,
    settings: Settings,
    trained_on: LanguageModelling,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score `model` on the questions of a probe; as `evaluate` on a recall task.

    Raises:
        ConfigError: the model's vocabulary is not that of `trained_on`, or it cannot read so much.
    """
    show = bars(console or Console(stderr=True))
    return {
        "task": asked.name,
        "kind": "recall",
        "split": "test",
        "trained_on": trained_on.name,
        "note": trained_on.note,
        "model": _model_facts(model),
        "num_passes": settings.num_passes,
        **score_probe(model, trained_on.store.tokenizer, asked, settings, show),
    }


def _text(
    model: TokenModel,
    task: LanguageModelling,
    split: Split,
    settings: Settings,
    trained_on: Task,
    show: Show,
) -> dict[str, Any]:
    if not isinstance(trained_on, LanguageModelling):
        raise ConfigError(
            f"task={task.name}: the run was trained on {trained_on.name}, "
            "which has no tokeniser to read a text with"
        )
    trained_on.prepare()
    _check_vocabulary(model, trained_on)
    text = read_text(task, split, trained_on, settings.ar_hits)
    check_lengths(model, text, trained_on.store.tokenizer, settings, trained_on.seq_len)
    result = score_text(model, text, settings, trained_on.seq_len, show)
    samples = sample(model, trained_on.store.tokenizer, settings)
    return {
        **result,
        "ar_hits": settings.ar_hits,
        "prompt": prompt_text(settings),
        "samples": samples,
    }


def _recall(
    model: TokenModel, task: Recall, split: Split, settings: Settings, show: Show
) -> dict[str, Any]:
    _check_vocabulary(model, task)
    task.prepare()
    slices = chosen_slices(task, split, settings)
    for part in slices:
        check_length(model, part.inputs.shape[1], f"slice {part.name}")
    scores = []
    with show("accuracy", len(slices)) as advance:
        for part in slices:
            scores.append(score_slice(model, part, settings.batch_size, settings.chunk))
            advance(1)
    groups: dict[str, list[SliceScore]] = {}
    for part, score in zip(slices, scores, strict=True):
        for group in part.groups:
            groups.setdefault(group, []).append(score)
    return {
        "guess": task.guess,
        "num_passes": settings.num_passes,
        "slices": [score.summary() for score in scores],
        "groups": [pooled(same, name).summary() for name, same in groups.items()],
        "all": pooled(scores).summary(),
    }


def _check_vocabulary(model: TokenModel, task: Task) -> None:
    if model.io != task.io:
        raise ConfigError(f"task={task.name} is for io={task.io}; the model has io={model.io}")
    if model.vocab_size != task.vocab_size:
        raise ConfigError(
            f"the model has a vocabulary of {model.vocab_size} ids, "
            f"task={task.name} of {task.vocab_size}: expected the same"
        )


def _model_facts(model: TokenModel) -> dict[str, Any]:
    """Whether a figure may be trusted at all, and what it was computed in."""
    device, dtype = model.head_weight.device, model.head_weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return {
        "causal": model.causal,
        "leak_reason": model.leak_reason,
        "precision": str(dtype).removeprefix("torch."),
        "device": device.type,
    }
