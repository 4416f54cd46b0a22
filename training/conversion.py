"""A trained softmax model's weights in a model with other mixers, and what is left to be trained.

A block is converted where the student has a mixer with `imitation_loss` in place of the teacher's
softmax attention, and kept where both have the same mixer.
"""

from collections.abc import Sequence

from layers.attention import Attention
from models.language_model import LanguageModel
from schema.errors import ConfigError

# Options by which queries, keys and values of one set of projections come out differently.
SHARED_OPTIONS = ("num_heads", "num_kv_heads", "key_dim", "value_dim", "rotary", "rotary_base")


def converted_blocks(student: LanguageModel, teacher: LanguageModel) -> list[int]:
    """The blocks that are converted, in order.

    Raises:
        ConfigError: another width or number of blocks, a mixer that can neither be kept nor be
            converted, or nothing to convert.
    """
    if student.d_model != teacher.d_model:
        raise ConfigError(
            f"model.d_model={student.d_model}: expected the teacher's {teacher.d_model}"
        )
    if len(student.mixers) != len(teacher.mixers):
        raise ConfigError(
            f"model.num_layers={len(student.mixers)}: expected the teacher's {len(teacher.mixers)}"
        )
    converted = []
    for i, (mixer, old) in enumerate(zip(student.mixers, teacher.mixers, strict=True)):
        name, old_name = type(mixer).__name__, type(old).__name__
        imitates = hasattr(mixer, "imitation_loss")
        if not imitates and name != old_name:
            raise ConfigError(
                f"pattern: block {i} is {name}, which has no imitation_loss, and the teacher's is "
                f"{old_name}; allowed: a mixer that imitates softmax attention, or the teacher's"
            )
        if imitates and name != old_name:
            if not isinstance(old, Attention):
                raise ConfigError(
                    f"pattern: block {i} is {name}, and the teacher's is {old_name}; "
                    "only softmax attention can be imitated"
                )
            converted.append(i)
        for option in SHARED_OPTIONS:
            own, expected = getattr(mixer, option, None), getattr(old, option, None)
            if own is not None and own != expected:
                raise ConfigError(
                    f"pattern: block {i} has {option}={own}; expected the teacher's {expected}"
                )
    if not converted:
        raise ConfigError("pattern: every block is the teacher's own; nothing is to be converted")
    return converted


def copy_weights(student: LanguageModel, teacher: LanguageModel) -> None:
    """Give every parameter and buffer of the teacher to that of the same name in the student.

    Raises:
        ConfigError: the student has none of that name, or one of another shape.
    """
    own, weights = student.state_dict(), teacher.state_dict()
    for name, weight in weights.items():
        if name not in own:
            raise ConfigError(f"the teacher's {name} has no counterpart in the model")
        if own[name].shape != weight.shape:
            raise ConfigError(
                f"{name} is {tuple(own[name].shape)}; expected the teacher's {tuple(weight.shape)}"
            )
    student.load_state_dict(weights, strict=False)


def train_only_what_is_new(
    student: LanguageModel, teacher: LanguageModel, converted: Sequence[int]
) -> None:
    """Freeze every parameter but those of the converted mixers that the teacher does not have.

    Raises:
        ConfigError: a converted mixer has nothing of its own.
    """
    student.requires_grad_(False)
    for i in converted:
        old = {name for name, _ in teacher.mixers[i].named_parameters()}
        new = [p for name, p in student.mixers[i].named_parameters() if name not in old]
        if not new:
            raise ConfigError(
                f"pattern: block {i} has no parameters but the teacher's; nothing is to be trained"
            )
        for parameter in new:
            parameter.requires_grad_(True)
