"""A trained network as a folder that loads without Hydra, Lightning or the data.

    model.safetensors   every parameter and buffer, named "model.<name>"
    config.json         the network's nodes with all their values, and its vocabulary
    tokenizer.json      of a text model, see tasks/text/interchange.py

config.json has the keys by which `transformers` finds models/hf.py, which reads the same folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from models.build import build_model, pattern_over_depth
from models.interface import TokenModel
from records.atomic import write_json
from schema.errors import ConfigError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODEL_TYPE = "seqmix"
PREFIX = "model."
_OURS = ("layers.", "models.")  # what a config.json may ask for: it may come from anywhere
_NODES = ("channel_mixer", "norm", "projection", "projection_in", "extra_tokens", "io", "memory")


def network_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration (plain values) that its network is built from."""
    used = dict.fromkeys(pattern_over_depth(cfg["pattern"], cfg["model"]["num_layers"]))
    return {
        "model": cfg["model"],
        "pattern": cfg["pattern"],
        "mixers": {name: cfg["mixers"][name] for name in used},
        **{key: cfg[key] for key in _NODES if key in cfg},
    }


def check_target(folder: Path) -> None:
    """Return when an export can be written to `folder`.

    Raises:
        ConfigError: it is a file, or has files in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"to={folder}: expected a folder that is new or empty")


def write_exported(
    model: TokenModel,
    network: Mapping[str, Any],
    folder: Path,
    *,
    bos: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of `model` and how it is built.

    Args:
        network: of `network_of`, from which `build_model` makes a network of these tensors.
        bos: the id that begins a document, after which a text ends too; None for no text model.
        facts: kept under "trained_on" for a reader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    # transformers asks for the format; clones, because a safetensors file shares no memory.
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["SeqmixForCausalLM"],
        "vocab_size": model.vocab_size,
        "network": dict(network),
        "bos_token_id": bos,
        "eos_token_id": bos,  # the next document would begin
        "pad_token_id": bos,
        "trained_on": dict(facts or {}),
    }
    write_json(folder / CONFIG, config)


def load_exported(folder: str | Path) -> TokenModel:
    """The network of an exported folder, in evaluation mode on the CPU.

    Raises:
        ValueError: no exported model, or one of layers that are not of this package.
    """
    folder = Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no exported model, it has no {name}")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder}: model_type={config.get('model_type')!r}; expected {MODEL_TYPE!r}"
        )
    model = build_exported(config["network"], config["vocab_size"])
    try:
        model.load_state_dict(read_tensors(folder))
    except RuntimeError as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from None
    return model.eval()


def build_exported(network: Mapping[str, Any], vocab_size: int) -> TokenModel:
    """A network from its nodes.

    Raises:
        ValueError: a node names something else than a layer or model of this package.
    """
    for target in _targets(network):
        if not target.startswith(_OURS):
            raise ValueError(f"_target_={target}: allowed: classes in {' and '.join(_OURS)}")
    return build_model(network, vocab_size)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder by the network's own names."""
    saved = load_file(folder / WEIGHTS)
    return {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()}


def _targets(node: Any) -> list[str]:
    if isinstance(node, Mapping):
        own = [node["_target_"]] if node.get("_target_") else []
        return own + [target for value in node.values() for target in _targets(value)]
    if isinstance(node, (list, tuple)):
        return [target for value in node for target in _targets(value)]
    return []
