"""Triton kernels with settings measured on the GPU that trains."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kernels.autotune import Choices, autotuned
from training.errors import TrainingError


class AutotuneKernels(Callback):
    """Trains under kernels.autotune.autotuned.

    The choices (those of the first process) are in the checkpoints, so that a run goes on with the
    settings that it had.

    Raises:
        TrainingError: there is no GPU.
    """

    def __init__(self) -> None:
        self.choices: Choices = {}
        self._stack = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self._stack.enter_context(autotuned(self.choices))
        except RuntimeError as error:
            raise TrainingError(f"callbacks=autotune: {error}") from error

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stack.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stack.close()

    def state_dict(self) -> dict[str, Any]:
        return {"choices": self.choices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.choices.update(state_dict["choices"])
