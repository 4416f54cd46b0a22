"""JRT-RNN's objective: next token after the prefix, masked tokens inside it. B batch, T time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from layers.report import Report
from layers.segments import inside_prefix
from models.interface import TokenModel
from tasks.base import IGNORED
from training.objectives import Loss, with_auxiliary


class PrefixLanguageModel:
    """Next-token loss behind a prefix that is read in both directions, masked-token loss in it.

        loss = mean_{behind} CE(next token) + mask_weight * mean_{masked} CE(token itself)

    Positions of the prefix get no next-token label: they see their successor. The last of them
    gets none either. Source: Arora et al. 2024 (Just read twice), section 4.2 and equation 5,
    with the weights of its released recipe; the paper's text divides by the sum of the weights,
    see `normalise`.

    The mask is the model's first extra token: `extra_tokens` must be at least 1.

    Args:
        prefix_len: tokens of each row's first document that are read in both directions.
        mask_rate: probability that a token of the prefix is replaced by the mask.
        mask_weight: of the masked-token loss; 0 is a plain prefix language model.
        normalise: divide the loss by 1 + mask_weight.
        auxiliary: weights of the layers' auxiliary losses, as in NextToken.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        prefix_len: int,
        *,
        mask_rate: float = 0.15,
        mask_weight: float = 0.25,
        normalise: bool = False,
        auxiliary: Mapping[str, float] | None = None,
    ) -> None:
        if prefix_len < 1:
            raise ValueError(f"prefix_len={prefix_len}: expected at least 1")
        if not 0 < mask_rate < 1:
            raise ValueError(f"mask_rate={mask_rate}: expected more than 0 and less than 1")
        if mask_weight < 0:
            raise ValueError(f"mask_weight={mask_weight}: expected at least 0")
        self.prefix_len = prefix_len
        self.mask_rate = mask_rate
        self.mask_weight = mask_weight
        self.normalise = normalise
        self.auxiliary = dict(auxiliary or {})

    def __call__(self, model: TokenModel, batch: Mapping[str, Tensor], report: Report) -> Loss:
        """The loss of one batch of inputs and labels (B, T), optionally with segments (B, T)."""
        if model.extra_tokens < 1:
            raise ValueError(
                f"extra_tokens={model.extra_tokens}: expected at least 1, for the mask"
            )
        inputs, labels, segments = batch["inputs"], batch["labels"], batch.get("segments")
        B, T = inputs.shape
        prefix_len = torch.full((B,), self.prefix_len, device=inputs.device)
        inside = inside_prefix(prefix_len, B, T, segments)
        if not ((labels != IGNORED) & ~inside).any():
            raise ValueError(
                f"objective.prefix_len={self.prefix_len} leaves nothing to predict in sequences "
                f"of {T} tokens: expected less than {T}"
            )
        masked = inside & (torch.rand(B, T, device=inputs.device) < self.mask_rate)
        h, _ = model.hidden(
            inputs.masked_fill(masked, model.vocab_size),
            segments=segments,
            prefix_len=prefix_len,
            report=report,
        )
        weight = model.head_weight
        parts = {
            "next_token": linear_cross_entropy(h, weight, labels.masked_fill(inside, IGNORED)),
            "masked_token": self.mask_weight
            * linear_cross_entropy(h, weight, inputs.masked_fill(~masked, IGNORED)),
        }
        if self.normalise:
            parts = {name: part / (1 + self.mask_weight) for name, part in parts.items()}
        return with_auxiliary(parts, report, self.auxiliary)
