"""Which recall examples are scored, and how often their context is shown.

N examples, L length.
"""

from dataclasses import replace

import numpy as np

from evaluation.settings import Settings
from schema.errors import ConfigError
from schema.names import suggest
from tasks.base import IGNORED, Split
from tasks.recall.task import Recall, RecallSlice


def chosen_slices(task: Recall, split: Split, settings: Settings) -> list[RecallSlice]:
    """The slices that `settings` asks for, `task` being prepared.

    With `lengths` a slice is also in a group of its length, so that accuracy is seen to fall
    with it.

    Raises:
        ConfigError: an unknown slice, or a length or a repetition that the task does not have.
    """
    found = task.slices(split)
    if settings.lengths:
        found |= {
            name: part
            for name, part in task.slices_of_length(split, settings.lengths).items()
            if name not in found
        }
        found = {name: _grouped_by_length(part) for name, part in found.items()}
    names = list(found) if settings.slices is None else list(settings.slices)
    for name in names:
        if name not in found:
            raise ConfigError(f"eval.slices={name}: no such slice; {suggest(name, found)}")
    return [repeat_context(found[name], settings.num_passes) for name in names]


def repeat_context(part: RecallSlice, num_passes: int) -> RecallSlice:
    """`part` with its context shown `num_passes` times before the questions.

    Raises:
        ConfigError: a task whose questions stand among what they ask for.
    """
    if num_passes == 1:
        return part
    if part.context is None:
        raise ConfigError(
            f"eval.num_passes={num_passes}: slice {part.name} has questions in its context; "
            "allowed: 1"
        )
    context, question = part.inputs[:, : part.context], part.inputs[:, part.context :]
    inputs = np.concatenate([*[context] * num_passes, question], axis=1)
    labels = np.full_like(inputs, IGNORED)
    labels[:, -question.shape[1] :] = part.labels[:, part.context :]
    prefix = part.prefix_len and part.prefix_len * num_passes
    again = part.context * num_passes
    return replace(part, inputs=inputs, labels=labels, context=again, prefix_len=prefix)


def _grouped_by_length(part: RecallSlice) -> RecallSlice:
    length = f"length {part.inputs.shape[1]}"
    return replace(part, groups=(*part.groups, length))
