"""Attention transfer: a trained softmax model's attention, taught to other mixers.

B batch, T time.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kernels.linear_cross_entropy import linear_cross_entropy
from layers.hedgehog_window import Parts, only
from layers.report import Report
from models.language_model import LanguageModel
from schema.errors import ConfigError
from tasks.base import Task
from training.conversion import converted_blocks, copy_weights, train_only_what_is_new
from training.module import Training
from training.objectives import Loss, NextToken

Losses = dict[str, Tensor]


class AttentionTransfer:
    """The two stages in which a softmax model becomes one of other mixers.

    Stage 1: the student is the teacher with mixers that imitate attention in place of some of its
    layers. Each is fed what the teacher's own layer reads, and passes on what the teacher's says
    (teacher forcing), so that the layers learn independently; its loss is the mixer's
    `imitation_loss`, the objective their mean. Only what the teacher does not have is trained.
    Stage 2: the converted model is finetuned, all of it, on the next token.

    Source: Zhang et al. 2024 (The Hedgehog & the Porcupine), section 4.2 and appendix A; teacher
    forcing as in LoLCATs (Zhang et al. 2024). Differs from LoLCATs in stage 2, which there trains
    low-rank updates of the projections.

    Args:
        teacher: the folder of a run. Stage 2 takes that of the run it starts from when None.
        stage: 1 or 2. Stage 2 starts from `init_from`, the run of stage 1; without one from the
            teacher's weights, which is conversion without transfer.
        teacher_checkpoint: "best", "last" or a file.
        weights: of the mixers' losses in stage 1, by name; {loss: 1} when None. LoLCATs'
            {loss: 1, mse: 1000} adds the error of the layer's output.
        auxiliary: in stage 2, weights of the layers' auxiliary losses, as in NextToken.
        validation_batches: how many batches of the validation split `score` reads.

    Raises:
        ConfigError: stage 1 without a teacher, weights that are no numbers of at least 0, or
            fewer than one batch.
    """

    def __init__(
        self,
        teacher: str | None = None,
        *,
        stage: Literal[1, 2] = 1,
        teacher_checkpoint: str = "best",
        weights: Mapping[str, float] | None = None,
        auxiliary: Mapping[str, float] | None = None,
        validation_batches: int = 8,
    ) -> None:
        if stage not in (1, 2):
            raise ConfigError(f"objective.stage={stage}: allowed: 1, 2")
        if stage == 1 and teacher is None:
            raise ConfigError(
                "objective.teacher=null: stage 1 needs the run folder of a softmax model"
            )
        if validation_batches < 1:
            raise ConfigError(
                f"objective.validation_batches={validation_batches}: expected at least 1"
            )
        self.teacher = teacher
        self.stage = stage
        self.teacher_checkpoint = teacher_checkpoint
        self.weights = {"loss": 1.0} if weights is None else dict(weights)
        if not self.weights or min(self.weights.values()) < 0 or max(self.weights.values()) == 0:
            raise ConfigError(
                f"objective.weights={self.weights}: expected numbers of at least 0, not all 0"
            )
        self.validation_batches = validation_batches
        self.next_token = NextToken(auxiliary)
        self.model: LanguageModel | None = None  # of the teacher
        self.converted: list[int] = []

    def attach(self, student: LanguageModel, teacher: LanguageModel, *, copy: bool) -> None:
        """Take `teacher` for the teacher of `student`, and freeze what the stage does not train.

        Args:
            copy: give the student the teacher's weights first.

        Raises:
            ConfigError: the two do not fit.
        """
        self.converted = converted_blocks(student, teacher)
        if copy:
            copy_weights(student, teacher)
        if self.stage == 1:
            train_only_what_is_new(student, teacher, self.converted)
        self.model = teacher.eval().requires_grad_(False)

    def __call__(self, model: LanguageModel, batch: Mapping[str, Tensor], report: Report) -> Loss:
        """The loss of one batch of inputs (B, T), optionally with labels and segments (B, T).

        Raises:
            ConfigError: `weights` names a loss that a mixer does not have.
        """
        if self.stage == 2:
            return self.next_token(model, batch, report)
        by_name: dict[str, list[Tensor]] = {}
        for i, losses in self.layer_losses(model, batch):
            with report.scope(f"block{i}"):
                for name, value in losses.items():
                    by_name.setdefault(name, []).append(value)
                    if name != "loss":
                        report.stat(name, value)
        parts = {name: torch.stack(values).mean() for name, values in by_name.items()}
        for name in self.weights:
            if name not in parts:
                raise ConfigError(
                    f"objective.weights.{name}: no mixer has a loss of that name; "
                    f"allowed: {', '.join(parts)}"
                )
        total = torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum()
        parts.pop("loss")
        return Loss(total, parts)

    def layer_losses(
        self, model: LanguageModel, batch: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, Losses]]:
        """The imitation losses of every converted block, on what the teacher's block reads."""
        if self.model is None:
            raise RuntimeError("AttentionTransfer: attach a teacher first")
        tokens, segments = batch["inputs"], batch.get("segments")
        teacher = self.model.to(tokens.device)
        with torch.no_grad():
            x = teacher.embedding(tokens)
        for i, block in enumerate(teacher.blocks[: self.converted[-1] + 1]):
            with torch.no_grad():
                read = block.mixer_norm(x)  # type: ignore[operator]
                x, _ = block(x, segments=segments)
            if i in self.converted:
                mixer = model.mixers[i]
                yield i, mixer.imitation_loss(read, block.mixer, segments=segments)  # type: ignore[operator]

    @torch.no_grad()
    def score(
        self, model: LanguageModel, batches: Iterable[Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """How well `model` imitates the teacher, each batch counting equally.

        The mean over the layers of each imitation loss by its name ("transfer_loss" for the one
        that is minimised, if it is none of the others), and <name>/block<i> of each layer. Of a
        model with a softmax window in front of linear attention also what is lost with one of the
        two left out: both_parts_loss, window_only_loss and linear_only_loss, in nats per label of
        these batches.
        """
        training = model.training
        model.eval()
        sums: dict[str, float] = {}
        count = 0
        for batch in batches:
            batch = {n: x.to(model.head_weight.device) for n, x in batch.items()}
            for name, value in self._batch_scores(model, batch).items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
        model.train(training)
        return {name: value / count for name, value in sums.items()}

    def _batch_scores(self, model: LanguageModel, batch: Mapping[str, Tensor]) -> dict[str, float]:
        by_name: dict[str, dict[str, float]] = {}
        for i, losses in self.layer_losses(model, batch):
            minimised = losses.pop("loss")
            if not any(value is minimised for value in losses.values()):
                losses["transfer_loss"] = minimised
            for name, value in losses.items():
                by_name.setdefault(name, {})[f"{name}/block{i}"] = float(value)
        scores = {name: sum(each.values()) / len(each) for name, each in by_name.items()}
        for each in by_name.values():
            scores |= each
        return scores | _ablations(model, batch)


def objective_scores(module: Training, task: Task) -> dict[str, float]:
    """What the objective has to say of the validation split of `task`; mostly nothing."""
    objective = module.objective
    if not isinstance(objective, AttentionTransfer):
        return {}
    loader = DataLoader(
        task.validation_set(), batch_size=task.recipe.batch_size, collate_fn=task.collate
    )
    return objective.score(module.model, islice(loader, objective.validation_batches))


def _ablations(model: LanguageModel, batch: Mapping[str, Tensor]) -> dict[str, float]:
    losses = {}
    parts: dict[str, Parts] = {
        "both_parts_loss": "both",
        "window_only_loss": "window",
        "linear_only_loss": "linear",
    }
    for name, part in parts.items():
        with only(part, model) as some:
            if some:
                h, _ = model.hidden(batch["inputs"], segments=batch.get("segments"))
                loss = linear_cross_entropy(h, model.head_weight, batch["labels"])
                losses[name] = float(loss)
    return losses
