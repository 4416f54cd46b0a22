"""The language model under training, as Lightning's Trainer takes it."""

from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from layers.report import Report
from models.build import build_model
from models.interface import TokenModel
from models.language_model import LanguageModel
from training.objectives import Loss
from training.optim import ParameterGroups
from training.parallel import SequenceStrategy, shard, whole
from training.sequence import Relay

Objective = Callable[..., Loss]


class Training(LightningModule):
    """A model, what it minimises, and how it is updated.

    What a step measured stays on the device in the attributes below until somebody asks for it;
    training.callbacks.metrics does, every so many steps. Lightning's own `self.log` is not used:
    it costs more per step than a small model, and logs one micro-batch of an accumulated step.

    Args:
        model: is `self.model`, so that its parameters are `model.*` in a checkpoint.
        objective: (model, batch, report) -> Loss.
        optimizer: parameter groups -> optimizer.
        schedule: step -> factor of the learning rate.
        compile: run the objective, forward and backward, through torch.compile; validation and
            evaluation stay as they are.

    Attributes:
        loss: of the last micro-batch, with its parts, detached.
        report: what the layers had to say in the last micro-batch.
        tokens: positions that hold a token in the last micro-batch: padding is not counted.
        gradient_norm: before clipping, of the last update.
        gradient_norms: of each parameter in `gradient_names`, in that order.
        lr: of the last update.
    """

    def __init__(
        self,
        model: TokenModel,
        objective: Objective,
        optimizer: Callable[[ParameterGroups], Optimizer],
        schedule: Callable[[int], float],
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.minimised = torch.compile(objective) if compile else objective
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.loss: dict[str, Tensor] = {}
        self.report = Report()
        self.tokens: int | Tensor = 0
        self.gradient_norm = torch.zeros(())
        self.gradient_norms = torch.zeros(0)
        self.gradient_names: list[str] = []
        self.lr = 0.0
        self.relay: Relay | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The objective on one micro-batch."""
        self.report = Report()
        if self.relay is not None:
            batch = self.relay.part_of(batch)
        loss = self.minimised(self.model, batch, self.report)
        if self.relay is not None:
            weight = self.relay.weight_of(batch["labels"])
            loss = Loss(loss.total * weight, {n: part * weight for n, part in loss.parts.items()})
        self.loss = {"loss": loss.total.detach()}
        self.loss.update((name, part.detach()) for name, part in loss.parts.items())
        segments = batch.get("segments")
        self.tokens = batch["inputs"].numel() if segments is None else (segments >= 0).sum()
        return loss.total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the parameters, then what layers keep besides: those that have an `after_step`.

        It is called once per update, however many micro-batches that is made of.
        """
        super().optimizer_step(*args, **kwargs)
        for module in self.model.modules():
            after_step = getattr(module, "after_step", None)
            if after_step is not None:
                after_step()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and keep the norm: Lightning's own clipping throws it away."""
        named = {n: p for n, p in self.model.named_parameters() if p.grad is not None}
        parameters = list(named.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.gradient_names = list(named)
        # As nn.utils.get_total_norm computes it, which does not say what it adds up.
        self.gradient_norms = whole(torch.stack(torch._foreach_norm(gradients)))
        self.gradient_norm = torch.linalg.vector_norm(self.gradient_norms)
        if gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.gradient_norm)
        self.lr = optimizer.param_groups[0]["lr"]

    def configure_model(self) -> None:
        """Spread the network, or its sequences, over the processes as the strategy asks for it."""
        if isinstance(self.trainer.strategy, SequenceStrategy) and self.relay is None:
            assert isinstance(self.model, LanguageModel)  # see check_sequence
            self.relay = Relay(self.model)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer over the marked parameter groups, its rate set before every update."""
        optimizer = self.make_optimizer(ParameterGroups.of(self.model))
        scheduler = LambdaLR(optimizer, self.schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def build_module(cfg: DictConfig, vocab_size: int) -> Training:
    """The module that `cfg` describes, its model initialised from torch's global generator."""
    return Training(
        build_model(cfg, vocab_size),
        objective=instantiate(cfg.objective),
        optimizer=instantiate(cfg.optimizer),
        schedule=instantiate(cfg.scheduler),
        compile=cfg.compile,
    )
