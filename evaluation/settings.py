"""What an evaluation can be told; conf/eval.yaml has the same keys under `eval`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from schema.errors import ConfigError

ProtocolName = Literal["windowed", "carried"]
PROTOCOLS: tuple[ProtocolName, ...] = ("windowed", "carried")


@dataclass(frozen=True)
class Settings:
    """How a model is scored, and what is shown besides.

    Attributes:
        protocol: of text: "windowed", "carried" or "both"; see evaluation/protocols.py.
        window: places of a window; "train" is as many as in training, "document" is every
            document in one window.
        stride: places between windows; None is half a window, less where a prefix needs it.
        prefix: windowed: leading places of each window that a mixer with causal = "prefix" reads in
            both directions, and whose tokens are not scored; None is as many as in training.
        chunk: places that the carried protocol reads at once.
        batch_size: windows or documents side by side. Recall examples are read `batch_size *
            chunk` tokens at a time.
        samples: continuations of `prompt` to generate from a text model; 0 is none.
        prompt: text that each sample continues; None starts a document.
        max_new_tokens, temperature, top_k, top_p: of the samples, see models/generation.py.
        seed: of the samples.
        question: text that follows the prompt, behind a space.
        num_passes: how often what there is to know is shown before it is asked for (JRT-Prompt,
            Arora et al. 2024, "Just read twice"): the context of a recall example, or the prompt,
            which then stands between two questions. Perplexity is not concerned.
        lengths: of recall examples: every test slice again, at these values of seq_len.
        slices: names of the recall slices to score; None is all.
        ar_hits: of text: tokens that complete a pair of tokens already read, which occurs fewer
            times than this in training, are also scored apart (Zoology, Arora et al. 2023);
            None does not.
        cost: measure speed and count parameters, FLOPs and state bytes.

    Raises:
        ConfigError: a value out of its range, or two that contradict each other.
    """

    protocol: Literal["windowed", "carried", "both"] = "both"
    window: int | Literal["train", "document"] = "train"
    stride: int | None = None
    prefix: int | None = None
    chunk: int = 512
    batch_size: int = 8
    samples: int = 2
    prompt: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    cost: bool = True
    question: str | None = None
    num_passes: int = 1
    lengths: Sequence[int] | None = None
    slices: Sequence[str] | None = None
    ar_hits: int | None = None

    def __post_init__(self) -> None:
        if self.protocol not in (*PROTOCOLS, "both"):
            raise ConfigError(
                f"eval.protocol={self.protocol}: allowed: {', '.join(PROTOCOLS)}, both"
            )
        if not (self.window in ("train", "document") or _at_least(self.window, 1)):
            raise ConfigError(
                f"eval.window={self.window}: allowed: train, document or a number of at least 1"
            )
        for name, least in (
            ("chunk", 1),
            ("batch_size", 1),
            ("max_new_tokens", 1),
            ("samples", 0),
            ("num_passes", 1),
        ):
            if not _at_least(getattr(self, name), least):
                raise ConfigError(
                    f"eval.{name}={getattr(self, name)}: expected a number of at least {least}"
                )
        for length in self.lengths or ():
            if not _at_least(length, 1):
                raise ConfigError(f"eval.lengths={length}: expected numbers of at least 1")
        for name in ("stride", "top_k", "ar_hits"):
            if getattr(self, name) is not None and not _at_least(getattr(self, name), 1):
                raise ConfigError(
                    f"eval.{name}={getattr(self, name)}: expected null or a number of at least 1"
                )
        if self.prefix is not None and not _at_least(self.prefix, 0):
            raise ConfigError(f"eval.prefix={self.prefix}: expected null or a number of at least 0")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.question is not None and self.prompt is None:
            raise ConfigError("eval.question without eval.prompt: give what it is asked about")
        if self.stride is not None and self.window == "document":
            raise ConfigError(
                f"eval.stride={self.stride} with eval.window=document: a document is one window; "
                "leave one of them out"
            )
        if self.stride is not None and isinstance(self.window, int) and self.stride > self.window:
            raise ConfigError(
                f"eval.stride={self.stride}: allowed: up to eval.window={self.window}"
            )
        if not self.temperature >= 0:
            raise ConfigError(f"eval.temperature={self.temperature}: expected at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"eval.top_p={self.top_p}: allowed: null, or above 0 and up to 1")
        if self.temperature == 0 and not (self.top_k is None and self.top_p is None):
            raise ConfigError(
                f"eval.temperature=0 is greedy, but eval.top_k={self.top_k} and "
                f"eval.top_p={self.top_p} ask for sampling: leave one of them out"
            )

    @property
    def protocols(self) -> tuple[ProtocolName, ...]:
        """Those that `protocol` asks for."""
        return tuple(p for p in PROTOCOLS if self.protocol in (p, "both"))


def _at_least(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
