"""AdamW over parameter groups that follow the layers' own marks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layers.marks import marked_parameters
from schema.errors import ConfigError

FUSED_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class ParameterGroups:
    """Names and parameters that weight decay applies to, and those it does not.

    `max_lr` has those whose layer bounds their learning rate, with the bound.
    """

    decay: dict[str, nn.Parameter]
    no_decay: dict[str, nn.Parameter]
    max_lr: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterGroups":
        """The trainable parameters of `model`, shared ones once, by layers.marks."""
        groups: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]] = ({}, {})
        max_lr = {}
        for name, parameter, marks in marked_parameters(model):
            if parameter.requires_grad:
                groups[0 if marks.decay else 1][name] = parameter
                if marks.max_lr is not None:
                    max_lr[name] = marks.max_lr
        return cls(*groups, max_lr)

    def describe(self) -> str:
        """Both groups with their counts in one line each, and one for each bound of the rate."""
        everything = {**self.decay, **self.no_decay}
        kinds = {"weight decay": self.decay, "no weight decay": self.no_decay}
        for bound in sorted(set(self.max_lr.values())):
            bounded = {n: everything[n] for n, own in self.max_lr.items() if own == bound}
            kinds[f"learning rate at most {bound:g}"] = bounded
        return "\n".join(
            f"{title}: {sum(p.numel() for p in group.values()):,} parameters in "
            f"{len(group)} tensors ({_kinds(group)})"
            for title, group in kinds.items()
        )

    def options(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """What an optimizer of torch takes: a group for each rate and decay that occurs."""
        options = []
        for group, decay in ((self.decay, weight_decay), (self.no_decay, 0.0)):
            by_rate: dict[float, list[nn.Parameter]] = {lr: []}
            for name, parameter in group.items():
                rate = min(lr, self.max_lr.get(name, lr))
                by_rate.setdefault(rate, []).append(parameter)
            options += [
                {"params": parameters, "lr": rate, "weight_decay": decay}
                for rate, parameters in by_rate.items()
            ]
        return options


def adamw(
    groups: ParameterGroups,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), one fused kernel per step where torch has one.

    The first group has the rate `lr`; a layer may bound that of some of its parameters.

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
        groups.options(lr, weight_decay),
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
