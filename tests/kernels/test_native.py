"""Compiling C++ forms: once, by several processes at a time, and without a compiler."""

import multiprocessing
import warnings
from pathlib import Path

import pytest
import torch

from kernels import BackendError, linear_attention, selective_scan
from kernels.linear_attention import cpp as steps
from kernels.native import extension, library, library_on
from kernels.selective_scan import cpp
from tests.kernels.compare import needs_compiler


@pytest.fixture
def unbuilt(tmp_path, monkeypatch) -> Path:
    """The scan's sources under a name that nobody has built, and an empty folder of libraries."""
    for path in cpp.SOURCE.parent.glob("*.[ch]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cpp, "SOURCE", tmp_path / cpp.SOURCE.name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("SEQMIX_NO_CPP", raising=False)
    return cpp.SOURCE


@pytest.mark.parametrize(
    ("variable", "value", "warned", "error"),
    [
        ("CXX", "/nonexistent/c++", 1, "needs a C.. compiler: '/nonexistent/c..' is not there"),
        ("CXX", "false", 1, r"false fails on scan\.cpp"),
        ("SEQMIX_NO_CPP", "1", 0, "switched off by SEQMIX_NO_CPP=1"),
    ],
)
def test_without_a_compiler_auto_warns_once_and_a_request_fails(
    variable, value, warned, error, unbuilt, monkeypatch
):
    monkeypatch.setenv(variable, value)
    u, A, B = torch.ones(1, 2, 4), -torch.ones(2, 3), torch.ones(1, 3, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = (selective_scan(u, u, A, B, B) for _ in range(2))
    said = [str(w.message) for w in caught if "PyTorch form" in str(w.message)]
    assert len(said) == warned
    assert torch.equal(first, second)
    assert torch.equal(first, selective_scan(u, u, A, B, B, backend="torch"))
    with pytest.raises(BackendError, match=error):
        selective_scan(u, u, A, B, B, backend="cpp")


def test_no_library_for_another_device():
    with pytest.raises(BackendError, match="for ssd: its tensors are on meta, not on the cpu"):
        library_on("ssd", cpp.SOURCE, torch.device("meta"))


@pytest.mark.gpu
def test_cpp_serves_the_cpu_only():
    u, A, B = (torch.ones(*shape, device="cuda") for shape in ((1, 2, 4), (2, 3), (1, 3, 4)))
    with pytest.raises(BackendError, match="its tensors are on cuda, not on the cpu"):
        selective_scan(u, u, A, B, B, backend="cpp")


def answers(source: Path, barrier) -> None:
    """In a process of its own: both come to the compiler at the same time."""
    barrier.wait()
    assert library(source).answer() == 42


@needs_compiler
def test_two_processes_compile_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    source = tmp_path / "answer" / "answer.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }\n', encoding="utf-8")
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    both = [fork.Process(target=answers, args=(source, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert capfd.readouterr().err.count("compiling answer.cpp once") == 1
    assert library(source).answer() == 42
    assert "compiling" not in capfd.readouterr().err
    other = source.with_name("other.cpp")
    other.write_text('extern "C" int answer() { return 43; }\n', encoding="utf-8")
    assert library(other).answer() == 43, "other sources, the same library"


@needs_compiler
def test_a_compiler_error_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    source = tmp_path / "wrong.cpp"
    source.write_text("int answer() { return nothing; }\n", encoding="utf-8")
    with pytest.raises(BackendError, match=r"fails on wrong\.cpp: .*nothing.*declared") as failure:
        library(source)
    assert "\n" not in str(failure.value)
    assert not list((tmp_path / "seqmix").glob("*.so*"))


EXTENSION = """
#include "tensors.h"
PyObject* size(PyObject*, PyObject* const* given, Py_ssize_t) {
  return PyLong_FromLong(THPVariable_Unpack(given[0]).numel());
}
EXTENSION(extent, FUNCTION(size))
"""


@needs_compiler
def test_an_extension_is_a_module_that_takes_tensors(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    source = tmp_path / "extent.cpp"
    source.write_text(EXTENSION, encoding="utf-8")
    assert extension(source).size(torch.ones(2, 3)) == 6
    assert extension(source) is extension(source)
    assert capfd.readouterr().err.count("compiling extent.cpp once") == 1
    misnamed = tmp_path / "other.cpp"
    misnamed.write_text(EXTENSION, encoding="utf-8")
    with pytest.raises(BackendError, match=r"does not load: .*PyInit_other") as failure:
        extension(misnamed)
    assert "\n" not in str(failure.value)


@needs_compiler
def test_without_pythons_headers_steps_are_torchs(tmp_path, monkeypatch):
    """As on a system that keeps them in a package of their own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(steps, "SOURCE", tmp_path / "step.cpp")
    steps.SOURCE.write_text('#include "no/Python.h"\n', encoding="utf-8")
    q, state = torch.ones(1, 1, 2, 4), (torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4))
    with torch.no_grad():
        with pytest.warns(UserWarning, match="the slower PyTorch form runs instead: .*no/Python.h"):
            first = linear_attention(q, q, q, initial_state=state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(linear_attention(q, q, q, initial_state=state), first)
        assert torch.equal(linear_attention(q, q, q, initial_state=state, backend="torch"), first)
        with pytest.raises(BackendError, match=r"fails on step\.cpp: .*no/Python.h"):
            linear_attention(q, q, q, initial_state=state, backend="cpp")
