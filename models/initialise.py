"""Initialisation of a whole model that leaves alone what a layer initialises itself."""

from torch import nn

from layers.marks import marked_parameters

STANDARD_DEVIATION = 0.02  # GPT-2's, for embeddings and dense projections alike


def initialise(model: nn.Module, std: float = STANDARD_DEVIATION) -> None:
    """Draw the weights of every nn.Linear and nn.Embedding from normal(0, std), biases zero.

    Parameters marked `own_init`, and those of any other kind of module, keep the values that
    their layer gave them. Shared parameters are drawn once.
    """
    own = {id(p) for _, p, marks in marked_parameters(model) if marks.own_init}
    done: set[int] = set()
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        if id(module.weight) not in own | done:
            nn.init.normal_(module.weight, std=std)
            done.add(id(module.weight))
        bias = getattr(module, "bias", None)
        if bias is not None and id(bias) not in own:
            nn.init.zeros_(bias)
