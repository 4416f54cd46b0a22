"""What a layer says about its own parameters: who initialises them, and how they are trained.

The marks live on the module that owns the parameter, not on the tensor: attributes of a tensor
are lost by deepcopy, by moving a model to another device and by building it on "meta".
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Marks:
    """`decay`: weight decay applies. `own_init`: the model's initialiser keeps away. `max_lr`: the
    peak learning rate is this where the optimizer's is higher."""

    decay: bool = True
    own_init: bool = False
    max_lr: float | None = None


def mark(
    module: nn.Module,
    *names: str,
    decay: bool = True,
    own_init: bool = False,
    max_lr: float | None = None,
) -> None:
    """Mark the parameters `names` that `module` itself owns, see Marks.

    Raises:
        AttributeError: `module` has no parameter of that name.
    """
    marks = module.__dict__.setdefault("_seqmix_marks", {})
    for name in names:
        if name not in module._parameters:
            raise AttributeError(f"{type(module).__name__} has no parameter {name!r} to mark")
        marks[name] = Marks(decay, own_init, max_lr)


def marked_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Marks]]:
    """(full name, parameter, marks) of every parameter, shared ones once.

    Parameters that no layer marked decay when they have two or more dimensions: gains and biases
    do not.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        marks = module.__dict__.get("_seqmix_marks", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{prefix}.{name}" if prefix else name
            yield full, parameter, marks.get(name, Marks(decay=parameter.ndim >= 2))
