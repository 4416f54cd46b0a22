"""Run folders without the training, written by records' own writer, their truth known."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from records.folder import RunFolder

LENGTH = 64
BATCH_TOKENS = 4096
COSTS = {  # parameters, FLOPs per token, state bytes
    "attention": (120_000, 410_000, 131_072),
    "hedgehog": (121_000, 520_000, 33_024),
    "mamba": (151_000, 380_000, 9_216),
    "conv": (119_500, 260_000, 1_024),
    "routing_topw": (120_400, 430_000, 131_072),
}


def write_run(
    path: Path,
    pattern: str | Sequence[str],
    seed: int,
    evaluation: Mapping[str, Any] | None,
    *,
    options: Mapping[str, Any] | None = None,
    validation: float = 3.0,
    status: str = "finished",
    error: str | None = None,
    data: str = "a",
    losses: Sequence[float] | None = None,
    record: Mapping[str, Any] | None = None,
) -> RunFolder:
    """One run folder; `options` are further keys of the configuration, dotted."""
    name = pattern if isinstance(pattern, str) else "-".join(pattern)
    kind = "text" if evaluation is None else evaluation["kind"]
    task = "text" if evaluation is None else evaluation["task"]
    cfg = OmegaConf.create(
        {
            "pattern": pattern if isinstance(pattern, str) else list(pattern),
            "seed": seed,
            "run_dir": str(path),
            "model": {"d_model": 64, "num_layers": 2},
            "mixers": {"attention": {"d_model": 64, "rotary": True}},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
            "trainer": {"max_steps": 50, "num_workers": 0},
            "task": {"recipe": {"lr": 1e-3}},
        }
    )
    for key, value in (options or {}).items():
        OmegaConf.update(cfg, key, value)
    parameters, flops, state = COSTS.get(name, COSTS["attention"])
    causal = "leaky" if name == "routing_topw" else "strict"
    run = RunFolder.create(
        path,
        cfg,
        {
            "command": f"python train.py pattern={name} seed={seed}",
            "seed": seed,
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "machine": {"cpu": "a processor", "threads": 2, "accelerators": []},
            "data": {"name": task, "kind": kind, "splits": splits(evaluation, data)},
            "model": {
                "parameters": parameters,
                "length": LENGTH,
                "flops_per_token": float(flops),
                "state_bytes": state,
                "causal": causal,
                "leak_reason": "a cluster is chosen from all positions"
                if causal == "leaky"
                else "",
            },
        },
    )
    _write_metrics(run, kind, validation, losses, seed, flops)
    if evaluation is not None:
        run.write_evaluation(task, dict(evaluation))
    extra = {} if error is None else {"error": error}
    steps = {"steps": 50, "tokens": 5 * 10 * BATCH_TOKENS}
    run.close(status, **extra, **steps, **(record or {}))  # type: ignore[arg-type]
    return run


def splits(evaluation: Mapping[str, Any] | None, data: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {"sha256": f"{data}-{name}"} for name in ("train", "validation", "test")
    }
    if evaluation is not None and evaluation["kind"] == "recall":
        found["test"]["slices"] = [
            {"seq_len": length, "num_kv_pairs": pairs, "name": f"L{length}_K{pairs}"}
            for length, pairs in SLICES
        ]
    return found


def _write_metrics(
    run: RunFolder,
    kind: str,
    validation: float,
    losses: Sequence[float] | None,
    seed: int,
    flops: float,
) -> None:
    column = "validation/accuracy" if kind == "recall" else "validation/loss"
    losses = [validation + 3 * 0.6**i for i in range(5)] if losses is None else losses
    noise = np.random.default_rng(seed).normal(0, 0.05, len(losses))
    file = run.open_metrics()
    for i, loss in enumerate(losses):
        row = {
            "tokens": 10 * BATCH_TOKENS * (i + 1),
            "train/loss": loss + noise[i],
            "train/tokens_per_second": 1e10 / flops + seed,
        }
        if np.isfinite(loss):
            row[column] = loss if kind == "text" else validation * (i + 1) / len(losses)
        file.append(10 * (i + 1), row)


def text_evaluation(loss: float, seed: int = 0, documents: int = 30) -> dict[str, Any]:
    """Perplexity exp(loss) on documents that are equally hard under every model of a seed."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(100, 4000, documents)
    hardness = rng.normal(0, 0.3, documents)
    noise = np.random.default_rng((seed, int(loss * 1e6))).normal(0, 0.01, documents)
    nats = loss + hardness + noise
    nll = nats * tokens * (loss * tokens.sum() / (nats * tokens).sum())
    bytes_, words = int(4 * tokens.sum()), int(tokens.sum() / 1.3)
    return {
        "checkpoint": "step-00000050.ckpt",
        "task": "text",
        "kind": "text",
        "split": "test",
        "trained_on": "text",
        "note": "",
        "model": {"causal": "strict", "leak_reason": ""},
        "text": {"documents": documents, "ids_sha256": f"text of {documents}"},
        "protocols": {
            "windowed": {
                "window": LENGTH,
                "stride": LENGTH // 2,
                "chunk": None,
                "prefix": 0,
                "nll": float(nll.sum()),
                "tokens": int(tokens.sum()),
                "token_perplexity": float(np.exp(loss)),
                "word_perplexity": float(np.exp(nll.sum() / words)),
                "bits_per_byte": float(nll.sum() / np.log(2) / bytes_),
            }
        },
        "documents": [
            {
                "title": f"document {i}",
                "tokens": int(t),
                "scored_tokens": {"windowed": int(t)},
                "nll": {"windowed": float(n)},
            }
            for i, (t, n) in enumerate(zip(tokens, nll, strict=True))
        ],
    }


SLICES = [(length, pairs) for length in (64, 128, 256) for pairs in (4, 8, 16)]


def recall_evaluation(accuracy: float) -> dict[str, Any]:
    """Recall that fades with the number of pairs; `accuracy` over all slices."""
    shares = np.array([np.exp(-pairs * length / 4000) for length, pairs in SLICES])
    shares *= accuracy / shares.mean()
    slices = [
        {
            "slice": f"L{length}_K{pairs}",
            "chance": 1 / pairs,
            "sequences": 100,
            "sequence_accuracy": float(share),
            "exact_accuracy": float(share) / 2,
        }
        for (length, pairs), share in zip(SLICES, shares, strict=True)
    ]
    return {
        "checkpoint": "step-00000050.ckpt",
        "task": "mqar",
        "kind": "recall",
        "split": "test",
        "trained_on": "mqar",
        "note": "",
        "model": {"causal": "strict", "leak_reason": ""},
        "guess": "naming one of the sequence's own values",
        "slices": slices,
        "all": {"sequence_accuracy": accuracy, "exact_accuracy": accuracy / 2},
    }


def text_sweep(root: Path, patterns: Mapping[str, float], seeds: int = 3) -> Path:
    """A folder of runs: the loss of each pattern, with noise that the patterns of a seed share."""
    for i, (pattern, loss) in enumerate(patterns.items()):
        for seed in range(seeds):
            shared, own = np.random.default_rng((1, seed)), np.random.default_rng((2, i, seed))
            got = loss + shared.normal(0, 0.02) + own.normal(0, 0.004)
            path = root / f"{pattern}_{seed}"
            write_run(path, pattern, seed, text_evaluation(got, seed), validation=got + 0.02)
    return root


def write_point(path: Path, status: str, error: str | None, overrides: Sequence[str]) -> None:
    """What a sweep leaves in the folder of a point."""
    path.mkdir(parents=True, exist_ok=True)
    said = {"status": status, "error": error, "overrides": list(overrides), "command": "python"}
    (path / "point.json").write_text(json.dumps(said))
