"""What a training step holds in memory, told where there is not enough of it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from layers.report import Report
from tasks.base import Batch
from training.errors import TrainingError
from training.module import Training

GIB = 1 << 30
_CPU = "DefaultCPUAllocator"  # how its message begins; the error is a plain RuntimeError


@contextmanager
def enough_memory(
    module: Training, loader: DataLoader, precision: Callable[[], AbstractContextManager]
) -> Iterator[None]:
    """A block whose end for want of memory is told in one line, with what a step needs.

    Args:
        loader: has the batches of training.
        precision: makes the context of the forward passes.

    Raises:
        TrainingError: memory did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and _CPU not in str(error):
            raise
        raise TrainingError(f"out of memory: {_needed(module, loader, precision)}") from error


def activation_bytes(
    module: Training,
    batch: Batch,
    precision: Callable[[], AbstractContextManager],
) -> int:
    """Bytes that one micro-batch keeps for its backward pass; nothing is computed or allocated."""
    kept: dict[int, Tensor] = {}  # held, or another tensor would be given a storage's place
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = (*module.model.parameters(), *module.model.buffers())
        stand_ins = {id(x): mode.from_tensor(x) for x in tensors}
        network = copy.deepcopy(module.model, dict(stand_ins))  # its buffers may be written to
        own = {_place(x) for x in stand_ins.values()}

        def keep(x: Tensor) -> Tensor:
            if _place(x) not in own:
                kept[_place(x)] = x
            return x

        fake = {n: mode.from_tensor(x) for n, x in batch.items() if isinstance(x, Tensor)}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), precision():
            module.objective(network, fake, Report())
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def _needed(
    module: Training, loader: DataLoader, precision: Callable[[], AbstractContextManager]
) -> str:
    weights = sum(p.numel() * p.itemsize for p in module.model.parameters())
    rows = len(loader.batch_sampler.batch(0))  # type: ignore[union-attr]
    batch: Batch = loader.collate_fn([loader.dataset[0]] * rows)  # type: ignore[assignment]
    size = f"task.recipe.batch_size={rows} x {batch['inputs'].shape[1]} tokens"
    try:
        activations = f"{activation_bytes(module, batch, precision) / GIB:.2f} GiB"
    except Exception:  # no estimate is worth more than the message that it stands in
        activations = "an unknown amount"
    return (
        f"weights, gradients and Adam's moments take {4 * weights / GIB:.2f} GiB, and {size} keep "
        f"{activations} for the backward pass; a smaller batch with a larger trainer.accumulate "
        "keeps less"
    )


def _place(x: Tensor) -> int:
    return x.untyped_storage()._cdata
