"""Whole mixers beside softmax attention, on inputs of one size."""

from collections.abc import Sequence

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.contenders import Contender
from layers.mixer import Mixer

BASELINE = "attention"


def mixers_side_by_side(
    cfg: DictConfig,
    names: Sequence[str],
    batch: int,
    T: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    decode: bool,
) -> dict[str, Contender]:
    """The mixers `names` and softmax attention, configured by `cfg`; the first is compared.

    With `decode` a call reads one token behind T others, as generation does.
    """
    contenders = {}
    for name in dict.fromkeys([*names, BASELINE]):
        torch.manual_seed(0)
        mixer: Mixer = instantiate(cfg.mixers[name]).to(device, dtype)
        x = torch.randn(batch, T, mixer.d_model, device=device, dtype=dtype)
        if not decode:
            weights = tuple(p for p in mixer.parameters() if p.requires_grad)
            contenders[name] = Contender(
                lambda x, m=mixer: m(x)[0], (x,), same=False, weights=weights
            )
            continue
        with torch.no_grad():
            room = mixer.new_state(batch, T + 1, device, dtype)
            _, state = mixer(x, room, want_state=True)
        contenders[name] = Contender(
            lambda x, m=mixer, s=state: m(x, s, want_state=True)[0], (x[:, -1:],), same=False
        )
    return contenders
