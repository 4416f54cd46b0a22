"""Compiling C++ forms: once, by several processes at a time, and without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.native import has_compiler

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

SCAN = """
import warnings, sys, torch
from kernels import BackendError, selective_scan
u, A, B = torch.ones(1, 2, 4), -torch.ones(2, 3), torch.ones(1, 3, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = selective_scan(u, u, A, B, B)
    selective_scan(u, u, A, B, B)
assert torch.allclose(first, selective_scan(u, u, A, B, B, backend="reference"), rtol=1e-5)
print("WARNINGS", *[w.message for w in caught], sep="|")
try:
    selective_scan(u, u, A, B, B, backend="cpp")
except BackendError as error:
    print("ERROR", error, sep="|")
"""
TWICE = """
import sys
from pathlib import Path
from kernels.native import library
sys.stdin.readline()
assert library(Path(sys.argv[1])).answer() == 42
"""


def start(script: str, *args: str, **environment: str) -> subprocess.Popen:
    """Another Python in the root of the repository."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen, said: str = "") -> tuple[str, str]:
    """What a process printed; it has to end well."""
    out, err = process.communicate(said, timeout=120)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.parametrize(
    ("environment", "warning", "error"),
    [
        ({"CXX": "/nonexistent/c++"}, "the slower PyTorch form runs", "needs a C++ compiler"),
        ({"CXX": "false"}, "the slower PyTorch form runs", "false fails on scan.cpp"),
        ({"SEQMIX_NO_CPP": "1"}, None, "switched off by SEQMIX_NO_CPP=1"),
    ],
    ids=["absent", "broken", "switched-off"],
)
def test_without_a_compiler_auto_warns_once_and_a_request_fails(
    environment, warning, error, tmp_path
):
    switches = {"SEQMIX_NO_CPP": "0", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    out, _ = finished(start(SCAN, **(switches | environment)))
    warned, failed = out.splitlines()
    assert warned.count(warning or "PyTorch form") == (0 if warning is None else 1)
    assert error in failed


@needs_compiler
def test_two_processes_compile_once(tmp_path):
    source = tmp_path / "answer" / "answer.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }\n', encoding="utf-8")
    both = [start(TWICE, str(source), TORCH_EXTENSIONS_DIR=str(tmp_path)) for _ in range(2)]
    for process in both:  # both wait for their line, then go at the same time
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = "".join(finished(process)[1] for process in both)
    assert said.count("compiling answer.cpp once") == 1
    assert len(list((tmp_path / "seqmix").glob("answer-*.so"))) == 1
    source.write_text('extern "C" int answer() { return 6 * 7; }\n', encoding="utf-8")
    _, said = finished(start(TWICE, str(source), TORCH_EXTENSIONS_DIR=str(tmp_path)), "go\n")
    assert "compiling" in said, "changed sources need another library"


@needs_compiler
def test_a_compiler_error_is_one_line(tmp_path):
    from kernels import BackendError
    from kernels.native import library

    source = tmp_path / "wrong.cpp"
    source.write_text("int answer() { return nothing; }\n", encoding="utf-8")
    with pytest.raises(BackendError, match=r"fails on wrong\.cpp: .*'nothing' was not declared"):
        library(source)
