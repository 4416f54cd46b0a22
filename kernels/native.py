"""C++ forms of operators: compiled on first use, kept on disk, called through ctypes.

A library is built by one compiler call from the .cpp file of an operator's folder and stays in
torch's folder of extensions (TORCH_EXTENSIONS_DIR, by default under ~/.cache), under a name that
follows from its sources, the compiler, its flags, the version of torch and the processor.
SEQMIX_NO_CPP=1 switches all of this off; CXX names the compiler (by default c++).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from kernels.dispatch import BackendError

SWITCH = "SEQMIX_NO_CPP"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
SHARED = Path(__file__).parent  # headers for several operators
DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # that C++ reads, in the order of lanes.h
SECONDS = 300  # that a compiler may take, or another process that compiles the same


def switched_off() -> bool:
    """Whether the environment asks for no C++ forms."""
    return os.environ.get(SWITCH, "") not in ("", "0")


def has_compiler() -> bool:
    """Whether C++ forms are switched on and a compiler is there."""
    return not switched_off() and _compiler() is not None


def library(source: Path) -> ctypes.CDLL:
    """The library built from `source`, the headers beside it and those of SHARED.

    Safe with several processes at once: one compiles, the others wait for it.

    Raises:
        BackendError: switched off, no compiler, or the compiler failed; the message is one line.
    """
    if switched_off():
        raise BackendError(f"backend='cpp' is switched off by {SWITCH}={os.environ[SWITCH]}")
    return _library(source)


def library_for(operator: str, source: Path, form: str, device: torch.device) -> ctypes.CDLL | None:
    """What computes `form` of an operator on `device`; None for another form than C++.

    Args:
        form: "cpp"; or "auto", which is C++ on a CPU where it is switched on and can be built. Any
            other is not C++.

    Raises:
        BackendError: "cpp" off the CPU, or see `library`.
    """
    if form == "cpp":
        if device.type != "cpu":
            raise BackendError(
                f"backend='cpp' for {operator}: its tensors are on {device.type}, not on the cpu"
            )
        return library(source)
    if form != "auto" or device.type != "cpu" or switched_off():
        return None
    return library_or_none(source)


@cache
def library_or_none(source: Path) -> ctypes.CDLL | None:
    """`library`, or None and one warning per process where it cannot be built."""
    try:
        return _library(source)
    except BackendError as error:
        warnings.warn(f"the slower PyTorch form runs instead: {error}", stacklevel=2)
        return None


@cache
def _library(source: Path) -> ctypes.CDLL:
    compiler = _compiler()
    if compiler is None:
        raise BackendError(
            f"backend='cpp' needs a C++ compiler: {os.environ.get('CXX', 'c++')!r} is not there; "
            f"name one in CXX, or set {SWITCH}=1 to do without"
        )
    target = _folder() / f"{source.parent.name}-{_fingerprint(source, compiler)}.so"
    if not target.exists():
        with FileLock(target.with_suffix(".lock"), timeout=SECONDS):
            if not target.exists():
                _compile(compiler, source, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BackendError(f"backend='cpp': {target} does not load: {error}") from error


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _compile(compiler: str, source: Path, target: Path) -> None:
    print(f"compiling {source.name} once, some seconds, into {target}", file=sys.stderr, flush=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, f"-I{SHARED}", str(source), "-o", str(unfinished)]
    english = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=english)
        if done.returncode:
            first = next((x for x in done.stderr.splitlines() if "error:" in x), "no message")
            raise BackendError(f"backend='cpp': {compiler} fails on {source.name}: {first.strip()}")
        os.replace(unfinished, target)  # a library is there as a whole or not at all
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"backend='cpp': {compiler} does not compile: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _folder() -> Path:
    from torch.utils.cpp_extension import get_default_build_root  # half a second of imports

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    folder = Path(root) / "seqmix"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"backend='cpp': no folder for libraries: {error}") from error
    return folder


def _fingerprint(source: Path, compiler: str) -> str:
    """Of all that the library depends on: another processor must not get this one's."""
    digest = hashlib.sha256()
    for path in (*sorted(SHARED.glob("*.h")), *sorted(source.parent.glob("*.h")), source):
        digest.update(path.read_bytes())
    facts = (*FLAGS, os.path.realpath(compiler), torch.__version__, platform.machine(), _cpu())
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """Model and instruction sets."""
    wanted = ("model name", "flags", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
