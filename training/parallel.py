"""Several processes, each with the whole model (DDP, or on a part of time: see training.sequence)
or with a part of every parameter (FSDP2).

A checkpoint has one layout, that of a single process, whatever wrote it and whatever reads it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from models.block import Block
from models.interface import TokenModel

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def strategy_of(settings: DictConfig) -> Strategy | Literal["auto"]:
    """Lightning's strategy for trainer.devices and trainer.strategy."""
    if settings.strategy == "fsdp":
        return ShardedStrategy(settings.devices)
    if settings.devices == 1:
        return "auto"
    # Some parameters wait for what a batch need not have: a prefix, a second segment.
    kind = SequenceStrategy if settings.strategy == "sequence" else DDPStrategy
    return kind(find_unused_parameters=True)


class SequenceStrategy(DDPStrategy):
    """DDP among processes that have the same examples and different parts of time."""


def shard(model: TokenModel, mesh: DeviceMesh) -> None:
    """Leave each process of a one-dimensional `mesh` its part of every parameter (FSDP2).

    A block's parameters are gathered while it works. Those outside of blocks stay gathered from
    the forward pass to the backward pass, for the loss reads the head's.
    """
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be spread over the processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, with checkpoints in the layout of one process.

    Lightning's own numbers the optimizer's states by the order of the model's parameters, where a
    single process has that of the optimizer's groups.
    """

    def __init__(self, devices: int) -> None:
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Numbered through the groups, in the first process; nothing in the others."""
        found: Any = get_optimizer_state_dict(self._network, _plain(optimizer), options=WHOLE)
        if not self.is_global_zero:
            return {}
        number = {n: i for i, n in enumerate(_names(found["param_groups"]))}
        groups = [
            {**group, "params": [number[name] for name in group["params"]]}
            for group in found["param_groups"]
        ]
        states = {number[name]: state for name, state in found["state"].items()}
        return {"state": dict(sorted(states.items())), "param_groups": groups}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Every process reads all of it and keeps its part; what is left is returned."""
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
        set_model_state_dict(self._network, checkpoint.pop("state_dict"), options=WHOLE)
        for optimizer, state in zip(
            self.optimizers, checkpoint.pop("optimizer_states"), strict=True
        ):
            plain = _plain(optimizer)
            own: Any = get_optimizer_state_dict(self._network, plain)["param_groups"]
            names = _names(own)
            groups = [
                {**saved, "params": group["params"]}
                for saved, group in zip(state["param_groups"], own, strict=True)
            ]
            states = {names[number]: each for number, each in state["state"].items()}
            named: Any = {"state": states, "param_groups": groups}
            set_optimizer_state_dict(self._network, plain, named, options=WHOLE)
        return checkpoint

    @property
    def _network(self) -> torch.nn.Module:
        if self.model is None:
            raise RuntimeError("the strategy has no model yet")
        return self.model


def _plain(optimizer: Any) -> Optimizer:
    """Of Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _names(groups: list[Mapping[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["params"]]
