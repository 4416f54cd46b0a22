"""Sequence parallelism: each process trains on a part of time, and the mixers' states travel on.

Of n processes, number r has tokens r T / n .. (r + 1) T / n of every sequence of a batch. Each
mixer begins with the state that process r - 1 ended in and hands its own to process r + 1; their
gradients come back the same way. A process works on its next block while the one behind it works
on this one. B batch, T time.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from kernels.linear_cross_entropy import IGNORE
from layers.mixer import Mixer
from layers.state import map_state, tensors
from models.interface import TokenModel
from models.language_model import LanguageModel
from schema.errors import ConfigError

HERE = "trainer.strategy=sequence"
NEXT_TOKEN = "training.objectives.NextToken"


class Relay:
    """Hands the states of a model's mixers on, from here to the next process, while it trains.

    Args:
        model: one that check_sequence has let pass; gets hooks at the mixers of its blocks, which
            rest while it is in evaluation mode.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Of its own: gradients are added up in the usual one meanwhile.
        self.group: Any = dist.new_group()
        for number, mixer in enumerate(model.mixers):
            hooks = _Hooks(self, number)
            mixer.register_forward_pre_hook(hooks.before, with_kwargs=True)
            mixer.register_forward_hook(hooks.after)

    def part_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's tokens of a batch whose tensors are (B, T).

        Raises:
            ConfigError: T is no multiple of the number of processes.
        """
        T = batch["inputs"].shape[1]
        _check_length(T, self.size)
        here = slice(self.rank * T // self.size, (self.rank + 1) * T // self.size)
        return {name: x[:, here].contiguous() for name, x in batch.items()}

    def weight_of(self, labels: Tensor) -> Tensor:
        """What the mean loss here counts in the mean over processes: labels here over the mean."""
        here = (labels != IGNORE).sum().float()
        total = here.clone()
        dist.all_reduce(total, group=self.group)
        return self.size * here / total.clamp(min=1)


def check_sequence(cfg: DictConfig, model: TokenModel, length: int) -> None:
    """Return when `cfg` does not ask for sequence parallelism, or it can be done.

    Args:
        cfg: of the whole run.
        length: T of an example.

    Raises:
        ConfigError: what cannot.
    """
    if cfg.trainer.strategy != "sequence":
        return
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"{HERE} with a {type(model).__name__}: allowed: a plain language model")
    for mixer in model.mixers:
        if not mixer.bounded_state or mixer.causal != "strict":
            raise ConfigError(
                f"{HERE}: {type(mixer).__name__} has no state of bounded size to hand on; "
                "allowed: causal mixers that have, such as mamba, hedgehog, conv, sliding_window"
            )
        if any(hasattr(module, "after_step") for module in mixer.modules()):
            raise ConfigError(
                f"{HERE}: {type(mixer).__name__} learns from what all processes see in a pass, "
                "and they do not see it at the same time"
            )
    if cfg.compile:
        raise ConfigError(f"{HERE} with compile=true: states travel between compiled parts")
    if cfg.objective._target_ != NEXT_TOKEN:
        raise ConfigError(f"{HERE} with objective {cfg.objective._target_}: allowed: next_token")
    _check_length(length, cfg.trainer.devices)


def _check_length(length: int, processes: int) -> None:
    if length % processes:
        raise ConfigError(
            f"{HERE}: {length} tokens on trainer.devices={processes} processes; expected a multiple"
        )


class _Hooks:
    """Before and after one mixer's forward pass; `number` is its block's."""

    def __init__(self, relay: Relay, number: int) -> None:
        self.relay = relay
        self.number = number

    def before(self, mixer: Mixer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not mixer.training:
            return None
        x: Tensor = args[0]
        state = None
        if self.relay.rank > 0:
            form = self.receive_form(x.device)
            received = iter(_Receive.apply(x, self, [*tensors(form)]))
            state = map_state(lambda _: next(received), form)
        return (x, state), {**kwargs, "want_state": True}

    def after(self, mixer: Mixer, args: tuple, output: tuple[Tensor, Any]) -> Any:
        if not mixer.training:
            return None
        y, state = output
        if self.relay.rank < self.relay.size - 1:
            self.send_form(state, y.device)
            y = _Send.apply(y, self, *tensors(state))
        return y, None

    def send_form(self, state: Any, device: torch.device) -> None:
        """Shapes and dtypes of a state's tensors, and whatever else is in it."""
        form = [map_state(_without_memory, state)]
        dist.send_object_list(form, self.relay.rank + 1, group=self.relay.group, device=device)

    def receive_form(self, device: torch.device) -> Any:
        form: list[Any] = [None]
        dist.recv_object_list(form, self.relay.rank - 1, group=self.relay.group, device=device)
        return form[0]

    def send(self, x: Tensor, to: int) -> None:
        dist.send(_real(x.contiguous()), to, group=self.relay.group, tag=self.number)

    def receive(self, like: Tensor, source: int, device: torch.device) -> Tensor:
        x = torch.empty(like.shape, dtype=like.dtype, device=device)
        dist.recv(_real(x), source, group=self.relay.group, tag=self.number)
        return x


def _has_gradient(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _real(x: Tensor) -> Tensor:
    """The same memory in numbers that can be sent."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="meta")


class _Receive(torch.autograd.Function):
    """The state from the process before this one; its gradient goes there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, hooks: _Hooks, form: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """`x` is what the mixer reads: autograd comes by here where it needs a gradient."""
        ctx.hooks = hooks
        source = hooks.relay.rank - 1
        received = tuple(hooks.receive(like, source, x.device) for like in form)
        ctx.mark_non_differentiable(*(r for r in received if not _has_gradient(r)))
        ctx.wanted = [_has_gradient(r) for r in received]
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        for grad, wanted in zip(grads, ctx.wanted, strict=True):
            if wanted:
                ctx.hooks.send(grad, ctx.hooks.relay.rank - 1)
        return None, None, None


class _Send(torch.autograd.Function):
    """Hands the state to the next process; its gradient comes from there."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, hooks: _Hooks, *state: Tensor) -> Tensor:  # type: ignore[override]
        ctx.hooks = hooks
        ctx.form = [_without_memory(x) for x in state]
        for x in state:
            hooks.send(x, hooks.relay.rank + 1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        source = ctx.hooks.relay.rank + 1
        grads = [
            ctx.hooks.receive(like, source, grad_y.device) if _has_gradient(like) else None
            for like in ctx.form
        ]
        return grad_y, None, *grads
