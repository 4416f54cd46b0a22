"""What training minimises where a model answers with vectors. B batch, T time, E their width."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from layers.report import Report
from models.interface import TokenModel
from models.io import Vectors
from schema.errors import ConfigError
from tasks.base import IGNORED
from training.objectives import Loss, with_auxiliary


class SquaredError:
    """Squared distance of the answers to the labels' vectors, a mean over labels, plus the
    auxiliary losses that layers report: continuous MQAR's second loss (Zoology's code).

    Args:
        auxiliary: see NextToken.

    Raises:
        ConfigError: (when called) another model than one of vectors, or `auxiliary` names a loss
            that no layer reports.
    """

    def __init__(self, auxiliary: Mapping[str, float] | None = None) -> None:
        self.auxiliary = dict(auxiliary or {})

    def __call__(self, model: TokenModel, batch: Mapping[str, Tensor], report: Report) -> Loss:
        """The loss of one batch; see NextToken."""
        if not isinstance(model, Vectors):
            raise ConfigError(f"objective=squared_error: expected io=vectors, not {model.io}")
        h, _ = model.hidden(
            batch["inputs"],
            segments=batch.get("segments"),
            prefix_len=batch.get("prefix_len"),
            report=report,
        )
        asked = batch["labels"] != IGNORED
        told = model.answers(h[asked])  # (labels, E)
        wanted = model.embedding(batch["labels"][asked])
        main = F.mse_loss(told, wanted, reduction="sum") / asked.sum()
        return with_auxiliary({"squared_error": main}, report, self.auxiliary)
