"""What training minimises. B batch, T time."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from layers.report import Report
from models.interface import TokenModel
from schema.errors import ConfigError


@dataclass(frozen=True)
class Loss:
    """`total` is minimised; `parts` are what it was made of, when that is more than one thing."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class NextToken:
    """Cross entropy of the labels in nats per label, plus the auxiliary losses that layers report.

    Args:
        auxiliary: weight of each auxiliary loss by its name, in every layer that reports one of
            that name. A loss that is not listed has weight 1: a layer reports it already scaled
            as its paper has it.

    Raises:
        ConfigError: (when called) `auxiliary` names a loss that no layer reports.
    """

    def __init__(self, auxiliary: Mapping[str, float] | None = None) -> None:
        self.auxiliary = dict(auxiliary or {})

    def __call__(self, model: TokenModel, batch: Mapping[str, Tensor], report: Report) -> Loss:
        """The loss of one batch; the (B, T, V) logits are never held.

        Args:
            batch: inputs and labels (B, T), optional segments (B, T) and prefix_len (B,).
            report: is filled by the layers; its losses are added.
        """
        h, _ = model.hidden(
            batch["inputs"],
            segments=batch.get("segments"),
            prefix_len=batch.get("prefix_len"),
            report=report,
        )
        main = linear_cross_entropy(h, model.head_weight, batch["labels"])
        return with_auxiliary({"next_token": main}, report, self.auxiliary)


def with_auxiliary(
    parts: Mapping[str, Tensor], report: Report, weights: Mapping[str, float]
) -> Loss:
    """The sum of `parts` and of the layers' auxiliary losses, each times its weight in `weights`
    (1 where it is not listed); losses of one name are added up over the layers.

    Raises:
        ConfigError: `weights` names a loss that no layer reports.
    """
    auxiliary: dict[str, Tensor] = {}
    for name, value in report.losses.items():
        kind = name.rpartition("/")[2]
        weighted = weights.get(kind, 1.0) * value
        auxiliary[kind] = auxiliary[kind] + weighted if kind in auxiliary else weighted
    for kind in weights:
        if kind not in auxiliary:
            raise ConfigError(
                f"objective.auxiliary.{kind}: no layer reports a loss of that name; "
                f"reported: {', '.join(auxiliary) or 'none'}"
            )
    parts = {**parts, **auxiliary}
    first, *rest = parts.values()
    return Loss(sum(rest, start=first), parts if rest else {})
