"""AdamW over parameter groups that follow the layers' own marks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layers.marks import marked_parameters
from schema.errors import ConfigError

FUSED_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class ParameterGroups:
    """Names and parameters that weight decay applies to, and those it does not."""

    decay: dict[str, nn.Parameter]
    no_decay: dict[str, nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterGroups":
        """The trainable parameters of `model`, shared ones once, by layers.marks."""
        groups: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]] = ({}, {})
        for name, parameter, marks in marked_parameters(model):
            if parameter.requires_grad:
                groups[0 if marks.decay else 1][name] = parameter
        return cls(*groups)

    def describe(self) -> str:
        """Both groups with their counts in one line each."""
        return "\n".join(
            f"{title}: {sum(p.numel() for p in group.values()):,} parameters in "
            f"{len(group)} tensors ({_kinds(group)})"
            for title, group in (("weight decay", self.decay), ("no weight decay", self.no_decay))
        )


def adamw(
    groups: ParameterGroups,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), one fused kernel per step where torch has one.

    Raises:
        ConfigError: a number out of its range.
    """
    if lr <= 0:
        raise ConfigError(f"optimizer.lr={lr}: allowed: above 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas={list(betas)}: allowed: two numbers in [0, 1)")
    if weight_decay < 0 or eps < 0:
        raise ConfigError(
            f"optimizer.weight_decay={weight_decay}, optimizer.eps={eps}: allowed: 0 or more"
        )
    parameters = [*groups.decay.values(), *groups.no_decay.values()]
    return torch.optim.AdamW(
        [
            {"params": list(groups.decay.values()), "weight_decay": weight_decay},
            {"params": list(groups.no_decay.values()), "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(betas[0], betas[1]),
        eps=eps,
        fused=all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters),
    )


def _kinds(group: dict[str, nn.Parameter]) -> str:
    """The last parts of the names, each once: what kinds of parameters a group holds."""
    kinds = dict.fromkeys(".".join(name.split(".")[-2:]) for name in group)
    shown = list(kinds)[:8]
    return ", ".join(shown) + (", ..." if len(kinds) > len(shown) else "")
