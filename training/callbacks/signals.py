"""Ending a run at the next step when it is asked to, instead of in the middle of one."""

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal ended the run."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # SIGTERM is how a machine asks for what we then do; Ctrl-C ends a shell's command so.
        self.exit_code = 0 if number == signal.SIGTERM else 128 + number


class StopSignals(Callback):
    """As a context, takes SIGTERM and SIGINT (Ctrl-C) for a whole run.

    While steps are made a signal is noted in `received`, for whoever acts on it between two
    steps; a second one, or one at another time, raises Interrupted where the program is.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._stepping = False
        self._before: dict[int, Any] = {}

    @property
    def received(self) -> bool:
        """Whether the run was asked to stop."""
        return self.signal is not None

    def raise_if_received(self) -> None:
        """Raise Interrupted when training has ended because of a signal."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._install()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepping = True
        if self._before:
            # Lightning has put its own handler around ours by now, which ends a run by an
            # exception at a place where no checkpoint can be written.
            self._install()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepping = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stepping = False

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received
        self.signal = number
        if again or not self._stepping:
            raise Interrupted(number)
