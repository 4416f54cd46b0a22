"""A language model from a composed configuration."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from layers.mixer import Mixer
from layers.projection import Dense, Projection
from models.construct import construct, locate
from models.interface import TokenModel
from models.language_model import LanguageModel


def pattern_over_depth(pattern: str | Sequence[str], num_layers: int) -> list[str]:
    """The mixer of every layer: `pattern` repeated until the depth is filled.

    >>> pattern_over_depth(["mamba", "mamba", "attention"], 4)
    ['mamba', 'mamba', 'attention', 'mamba']
    """
    names = [pattern] if isinstance(pattern, str) else list(pattern)
    if not names:
        raise ValueError("pattern=[]: expected the name of a mixer or a list of names")
    return [names[i % len(names)] for i in range(num_layers)]


def build_model(cfg: Mapping[str, Any], vocab_size: int) -> TokenModel:
    """The model that `cfg` describes, initialised from torch's global generator.

    Reads the nodes model, pattern, mixers, channel_mixer, norm, projection, projection_in,
    extra_tokens, and io and memory, without which there is none. They may be OmegaConf's or plain.

    Raises:
        ValueError: an option that the model or one of its layers does not allow.
    """
    size = cfg["model"]
    chosen: Projection = construct(cfg["projection"])
    for_mixers = chosen if cfg["projection_in"] in ("all", "mixers") else Dense
    for_channels = chosen if cfg["projection_in"] in ("all", "channel_mixers") else Dense
    names = pattern_over_depth(cfg["pattern"], size["num_layers"])
    mixers: list[Mixer] = [_layer(f"mixers.{n}", cfg["mixers"][n], for_mixers) for n in names]
    channel_mixers = [_layer("channel_mixer", cfg["channel_mixer"], for_channels) for _ in names]
    norm: Callable[[int], nn.Module] = construct(cfg["norm"])
    model = LanguageModel(
        vocab_size,
        size["d_model"],
        mixers,
        channel_mixers,
        norm,
        tie_embeddings=size["tie_embeddings"],
        dropout=size["dropout"],
        embedding_dropout=size["embedding_dropout"],
        extra_tokens=cfg["extra_tokens"],
    )
    around = {key: construct(cfg.get(key)) for key in ("io", "memory")}
    used = [key for key, wrap in around.items() if wrap is not None]
    if len(used) > 1:
        raise ValueError("memory: expected none with io=vectors and io=auto_encoder")
    for key in used:
        try:
            return around[key](model)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return model


def _layer(key: str, node: Mapping[str, Any], projection: Projection) -> Any:
    """One layer, handed `projection` if it makes dense projections; None for `_target_: null`.

    What the layer does not allow is told with the `key` of its node.
    """
    if node.get("_target_") is None:
        return None
    takes = inspect.signature(locate(node["_target_"])).parameters
    try:
        return construct(node, **({"projection": projection} if "projection" in takes else {}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {error}") from error
