"""What each group of a configuration holds.

Groups that a constructor takes as a whole are nodes with `_target_`, typed by its signature.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from schema.types import Between, Node

Positive = Annotated[int, Between(1)]
Count = Annotated[int, Between(0)]
Share = Annotated[float, Between(0, 1)]
Accelerator = Literal["auto", "cpu", "gpu"]
Precision = Literal["fp32", "bf16"]


@dataclass
class Data:
    """Where data is looked for (`root`) and where tokenised text is kept (`cache`)."""

    root: str | None
    cache: str | None


@dataclass
class Model:
    """A size."""

    d_model: Positive
    num_layers: Positive
    num_heads: Positive
    tie_embeddings: bool
    dropout: Share
    embedding_dropout: Share


@dataclass
class Trainer:
    """The machine, the length of a run and what happens every so many steps.

    A step is an update of the parameters: `accumulate` batches.
    """

    accelerator: Accelerator
    devices: Positive
    strategy: Literal["ddp", "fsdp", "sequence"]
    threads: Positive | None
    precision: Precision | Literal["auto"]
    max_steps: Positive
    accumulate: Positive
    train_batches: Positive | None
    gradient_clip: Annotated[float, Between(0)] | None
    validate_every: Positive
    checkpoint_every: Positive
    keep_checkpoints: Positive
    log_every: Positive
    num_workers: Count
    keep_pages: bool
    deterministic: bool


@dataclass
class Match:
    """Which cost is to be that of another network, see models.matching."""

    quantity: Literal["params", "flops", "state"] | None
    to: str | list[str] | float | None
    key: str


@dataclass
class Budget:
    """What a run may cost; at most one of them, see training.budget."""

    tokens: Annotated[float, Between(1)] | None
    flops: Annotated[float, Between(1)] | None
    seconds: Annotated[float, Between(0)] | None


@dataclass
class Train:
    """conf/config.yaml: what train.py takes."""

    pattern: str | list[str]
    extra_tokens: Count
    projection_in: Literal["all", "mixers", "channel_mixers"]
    seed: Annotated[int, Between(0, 2**32 - 1)]
    run_dir: str | None
    resume: str | None
    init_from: str | None
    compile: bool
    match: Match
    budget: Budget
    data: Data
    model: Model
    trainer: Trainer
    task: Node
    mixers: dict[str, Node]
    channel_mixer: Node | None
    norm: Node
    projection: Node
    io: Node | None
    memory: Node | None
    objective: Node
    optimizer: Node
    scheduler: Node
    logger: Node | None
    callbacks: dict[str, Node]
    files: list[str] | None = None  # there with task=text only


@dataclass
class Eval:
    """conf/eval.yaml: what eval.py takes.

    `model`, `channel_mixer` and `io` are there because a task chooses them, and are not used.
    """

    run: str
    checkpoint: str
    split: Literal["validation", "test"]
    eval: Node
    lm_eval: Node
    decode: list[Positive] | None
    data: Data
    accelerator: Accelerator
    precision: Precision
    seed: Annotated[int, Between(0, 2**32 - 1)]
    task: Node | None
    model: Any
    channel_mixer: Any
    io: Any
    files: list[str] | None = None
    probe: Node | None = None


@dataclass
class Bench:
    """conf/bench.yaml: what bench.py takes; see benchmarks.bench.Plan."""

    op: str | None
    mixer: str | list[str] | None
    suite: str | None
    overrides: list[str]
    peers: list[str] | None
    sizes: dict[str, int] | None
    modes: list[Literal["forward", "training", "decode"]]
    lengths: list[Positive]
    dtype: Precision
    rounds: Annotated[int, Between(3)]
    max_spread: Annotated[float, Between(1)]
    patience: Annotated[float, Between(0)]
    accelerator: Accelerator
    threads: Positive | None
    keep_pages: bool
    out: str | None


@dataclass
class Export:
    """conf/export.yaml: what export.py takes."""

    run: str
    to: str
    checkpoint: str
    data: Data


@dataclass
class StudyPlan:
    """conf/study/<name>.yaml; see evaluation.study.Plan."""

    common: list[str]
    arms: dict[str, list[str]]
    lrs: list[Annotated[float, Between(0)]]
    seeds: list[Count]
    columns: list[str]


@dataclass
class RecallStudy:
    """conf/recall_study.yaml: what recall_study.py takes."""

    study: StudyPlan
    out: str
    jobs: Positive


@dataclass
class Compare:
    """conf/compare.yaml: what compare.py takes; see analysis.sections.Settings."""

    runs: str | list[str]
    metric: str | None
    protocol: Literal["windowed", "carried"]
    baseline: str | None
    tuned: list[str]
    interval: Literal["t", "bootstrap"]
    out: str | None


@dataclass
class Search:
    """conf/search.yaml: what search.py takes; see training.search."""

    overrides: list[str]
    space: dict[str, Any]
    trials: Positive
    jobs: Positive
    seed: Annotated[int, Between(0, 2**32 - 1)]
    pruner: Literal["median", "none"]
    startup: Count
    out: str


SCHEMAS: dict[str, type] = {
    "config": Train,
    "eval": Eval,
    "bench": Bench,
    "compare": Compare,
    "export": Export,
    "recall_study": RecallStudy,
    "search": Search,
}
