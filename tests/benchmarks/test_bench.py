"""bench.py: every operator beside its peers, whole mixers, what is written, wrong input."""

import csv
import subprocess
import sys

import pytest
import torch

import benchmarks.bench as bench_module
import benchmarks.contenders as contenders
import benchmarks.operators as operators
from benchmarks.bench import Plan, bench
from benchmarks.contenders import OURS, Contender, Operator
from benchmarks.operators import OPERATORS
from benchmarks.recipes import ROOT
from schema.errors import ConfigError

CPU = torch.device("cpu")
SMALL = {
    "attention": {"B": 1, "H": 2, "K": 8, "V": 8},
    "causal_conv1d": {"B": 1, "D": 8},
    "estimated_sparse_attention": {"B": 1, "H": 2, "K": 8, "V": 8, "cells": 8, "columns": 8},
    "linear_attention": {"B": 1, "H": 2, "K": 8, "V": 8},
    "linear_attention_normalized": {"B": 1, "H": 2, "K": 8, "V": 8},
    "linear_attention_step": {"B": 1, "H": 2, "K": 8, "V": 8},
    "linear_cross_entropy": {"B": 1, "D": 8, "C": 50},
    "linear_recurrence": {"B": 1, "D": 8},
    "long_conv": {"B": 1, "D": 8},
    "monarch": {"D": 64},
    "rms_norm": {"B": 1, "D": 8},
    "routing_attention": {"B": 1, "H": 2, "K": 8, "V": 8, "clusters": 4, "window": 16},
    "routing_attention_topw": {"B": 1, "H": 2, "K": 8, "V": 8, "clusters": 4, "window": 16},
    "selective_scan": {"B": 1, "D": 8, "N": 4},
    "ssd": {"B": 1, "H": 2, "P": 8, "N": 8},
}


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_runs_beside_contenders_that_agree(op):
    length = 8 if op == "long_conv" else 64  # its reference is a loop within a loop
    plan = Plan(op=op, sizes=SMALL[op], lengths=[length], rounds=3, max_spread=1e9)
    rows = bench(plan, CPU)
    assert {row.mode for row in rows} == {"forward", "training"}
    assert rows[0].contender == OURS
    for row in rows:
        if not row.note.startswith("absent"):
            assert row.note == ""  # no output differs
            assert row.milliseconds > 0
            assert row.peak_mib > 0
            assert (row.ratio is None) == (row.contender == OURS)


def test_an_absent_peer_is_named(monkeypatch):
    def absent(module: str, name: str, package: str):
        return contenders.missing, f"absent: {package} (ImportError)"

    monkeypatch.setattr(operators, "peer", absent)
    rows = bench(Plan(op="ssd", sizes=SMALL["ssd"], lengths=[64], rounds=3), CPU)
    missing = [row for row in rows if row.contender == "fla naive chunk"]
    assert {row.note for row in missing} == {"absent: flash-linear-attention (ImportError)"}
    assert all(row.milliseconds is None for row in missing)


def test_a_contender_that_computes_something_else_is_told(monkeypatch):
    original = OPERATORS["rms_norm"]

    def make(*arguments):
        made = original.make(*arguments)
        wrong = made["torch rms_norm"]
        changed = Contender(lambda *x: 1.1 * wrong.run(*x), wrong.inputs)
        return {**made, "torch rms_norm": changed}

    monkeypatch.setitem(OPERATORS, "rms_norm", Operator(make, original.sizes))
    rows = bench(
        Plan(op="rms_norm", sizes=SMALL["rms_norm"], lengths=[64], rounds=3, max_spread=1e9), CPU
    )
    notes = {row.contender: row.note for row in rows if row.mode == "forward"}
    assert notes["torch rms_norm"].startswith("DIFFERS by 1.0e-01")
    assert notes["reference"] == ""


def test_what_would_take_too_long_is_left_out():
    plan = Plan(op="selective_scan", sizes=SMALL["selective_scan"], lengths=[64, 1 << 14])
    plan = Plan(**{**vars(plan), "rounds": 3, "patience": 1.0, "modes": ["forward"]})
    notes = {(row.length, row.contender): row.note for row in bench(plan, CPU)}
    assert notes[1 << 14, "reference"].startswith("left out: would take ")
    assert not notes[64, "reference"].startswith("left out")


def test_no_peak_is_looked_for_in_a_call_of_very_many_operations(monkeypatch):
    """The profiler would keep gigabytes of them; one after the other they are the reference."""
    monkeypatch.setattr(bench_module, "MOST_OPERATIONS", 100)
    plan = Plan(op="selective_scan", sizes=SMALL["selective_scan"], lengths=[64], rounds=3)
    peaks = {row.contender: row.peak_mib for row in bench(plan, CPU) if row.mode == "training"}
    assert peaks["reference"] is None
    assert peaks["seqmix"] > 0


def test_mixers_beside_attention_in_all_modes():
    overrides = ["model.d_model=16", "model.num_heads=2"]
    plan = Plan(
        mixer=["mamba", "hedgehog"],
        overrides=overrides,
        modes=["forward", "training", "decode"],
        lengths=[32],
        rounds=3,
    )
    rows = bench(plan, CPU)
    assert [row.contender for row in rows] == ["mamba", "hedgehog", "attention"] * 3
    assert all(row.milliseconds > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "op=None, mixer=None: give one of them"),
        ({"op": "ssd", "mixer": "mamba"}, "op=ssd, mixer=mamba: give one of them"),
        ({"op": "linear_atention"}, "op=linear_atention: no such operator; did you mean linear_at"),
        ({"mixer": "mambo"}, "mixer=mambo: no such mixer; did you mean mamba?"),
        ({"op": "ssd", "sizes": {"Q": 1}}, "sizes.Q: allowed: B, H, N, P"),
        ({"op": "ssd", "modes": ["decode"]}, "modes=decode: of mixers only"),
        ({"op": "ssd", "lengths": [8, 4]}, r"lengths=\[8, 4\]: expected numbers from 1 on"),
        ({"op": "ssd", "rounds": 1}, "rounds=1, "),
    ],
)
def test_wrong_plans_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Plan(**options)
    assert "\n" not in str(error.value)


def test_the_command_writes_a_table_a_file_and_a_picture(tmp_path):
    arguments = ["op=causal_conv1d", "sizes={B: 1, D: 8}", "lengths=[16,32,64]", "rounds=3"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"bench.csv", "bench.png"}
    assert "torch conv1d, transposed" in done.stdout
    with (folder / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    assert all(row["torch"] == torch.__version__ and row["dtype"] == "fp32" for row in rows)
    assert {row["length"] for row in rows} == {"16", "32", "64"}
