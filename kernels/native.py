"""C++ forms of operators: compiled on first use and kept on disk.

A library knows nothing of torch and Python and is called through ctypes; an extension is a module
of Python whose functions take tensors, for calls so short that ctypes would cost more than they do.
Either is built by one compiler call from the .cpp file of an operator's folder and stays in torch's
folder of extensions (TORCH_EXTENSIONS_DIR, by default under ~/.cache), under a name that follows
from its sources, the compiler, its flags, the versions of torch and Python and the processor.
SEQMIX_NO_CPP=1 switches all of this off; CXX names the compiler (by default c++).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from filelock import FileLock
from torch import Tensor

from kernels.dispatch import BackendError

SWITCH = "SEQMIX_NO_CPP"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
SHARED = Path(__file__).parent  # headers for several operators
DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # that C++ reads, in the order of lanes.h
SECONDS = 300  # that a compiler may take, or another process that compiles the same
HEADERS = ("include", "include/torch/csrc/api/include")  # of torch, for an extension
LIBRARIES = ("torch_python", "torch", "torch_cpu", "c10")  # that torch has loaded
ONE_THREAD = 1 << 20  # multiply-adds, about, from which on a second thread is worth its start

extensions: dict[Path, ModuleType] = {}  # that this process has loaded, by their sources


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
    return _switched_on(_library, source)


def extension(source: Path) -> ModuleType:
    """As `library`, an extension: the module that PyInit_<the stem of `source`> makes."""
    return _switched_on(_extension, source)


def library_for(operator: str, source: Path, form: str, device: torch.device) -> ctypes.CDLL | None:
    """What computes `form` of an operator on `device`; None for another form than C++.

    Args:
        form: "cpp"; or "auto", which is C++ on a CPU where it is switched on and can be built. Any
            other is not C++.

    Raises:
        BackendError: see `library_on`, for "cpp".
    """
    return _built_for(_library, operator, source, form, device)


def extension_for(
    operator: str, source: Path, form: str, device: torch.device
) -> ModuleType | None:
    """As `library_for`, an extension."""
    return _built_for(_extension, operator, source, form, device)


def library_on(operator: str, source: Path, device: torch.device) -> ctypes.CDLL:
    """`library` for tensors on `device`.

    Raises:
        BackendError: they are not on the CPU, or see `library`.
    """
    return _built_on(_library, operator, source, device)


Built = TypeVar("Built", ctypes.CDLL, ModuleType)


def _built_for(
    build: Callable[[Path], Built], operator: str, source: Path, form: str, device: torch.device
) -> Built | None:
    if form == "cpp":
        return _built_on(build, operator, source, device)
    if form != "auto" or device.type != "cpu" or switched_off():
        return None
    return _built_or_none(build, source)


def _built_on(
    build: Callable[[Path], Built], operator: str, source: Path, device: torch.device
) -> Built:
    if device.type != "cpu":
        raise BackendError(
            f"backend='cpp' for {operator}: its tensors are on {device.type}, not on the cpu"
        )
    return _switched_on(build, source)


def _switched_on(build: Callable[[Path], Built], source: Path) -> Built:
    if switched_off():
        raise BackendError(f"backend='cpp' is switched off by {SWITCH}={os.environ[SWITCH]}")
    return build(source)


@cache
def _built_or_none(build: Callable[[Path], Built], source: Path) -> Built | None:
    """None, and one warning per process, where it cannot be built."""
    try:
        return build(source)
    except BackendError as error:
        warnings.warn(f"the slower PyTorch form runs instead: {error}", stacklevel=2)
        return None


def fields(kind: type, *names: str) -> list[tuple[str, type]]:
    """Fields of one kind, for a ctypes.Structure."""
    return [(name, kind) for name in names]


def in_hardware(library: ctypes.CDLL) -> bool:
    """Whether a library multiplies in AMX's tiles (tiles.h), as far as the CPU has them.

    Its compiler may know none, and what it does in their place is slower than vectors.
    """
    return bool(library.in_hardware()) or not torch.cpu._is_amx_tile_supported()


class Tokens(ctypes.Structure):
    """A tensor (B, T, heads, width), the numbers of a token side by side: steps in numbers."""

    _fields_ = (
        *fields(ctypes.c_void_p, "data"),
        *fields(ctypes.c_int64, "batch", "time"),
    )


class Call:
    """A problem for the functions of a library, and the tensors it points to, which live as long.

    Args:
        problem: laid out as in the library's source, with a field `threads`.
        work: multiply-adds of a call, about, by which it gets one thread or all.
    """

    def __init__(self, library: ctypes.CDLL, problem: ctypes.Structure, work: float) -> None:
        self.library, self.problem, self.work = library, problem, work
        self._held: list[Tensor] = []

    def point(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor, in `dtype` and contiguous, for the pointer `name`."""
        tensor = readable(tensor, dtype)
        return self.describe(name, tensor, tensor.data_ptr())

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor for the result `name`."""
        return self.point(name, torch.empty(shape, dtype=dtype), dtype)

    def point_tokens(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor (B, T, heads, width), in `dtype`, for the field `name`, which is Tokens."""
        tensor = tensor.to(dtype)
        if tensor.stride()[2:] != (tensor.shape[3], 1):
            tensor = tensor.contiguous()
        return self.describe(name, tensor, Tokens(tensor.data_ptr(), *tensor.stride()[:2]))

    def describe(self, name: str, tensor: Tensor, by: object) -> Tensor:
        """The tensor for the field `name`, which says `by` what it reads."""
        setattr(self.problem, name, by)
        self._held.append(tensor)
        return tensor

    def run(self, function: str) -> int:
        """Call a function of the library."""
        threads = 1 if self.work < ONE_THREAD else torch.get_num_threads()
        self.problem.threads = threads  # type: ignore[attr-defined]
        return getattr(self.library, function)(ctypes.byref(self.problem))

    def forget(self) -> None:
        """Keep the tensors no longer: the call is done."""
        self._held.clear()


def stored_dtype(exact: torch.dtype, *tensors: Tensor) -> torch.dtype:
    """In which C++ reads tensors: their own if it is one that it knows, else that of sums."""
    own = tensors[0].dtype
    return own if own in DTYPES and all(x.dtype == own for x in tensors) else exact


def readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` and contiguous."""
    # Two calls that do nothing would cost as much as a decoding step.
    same = tensor.dtype == dtype and tensor.is_contiguous()
    return tensor if same else tensor.to(dtype).contiguous()


@cache
def _library(source: Path) -> ctypes.CDLL:
    target = _build(source)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BackendError(f"backend='cpp': {target} does not load: {error}") from error


def _extension(source: Path) -> ModuleType:
    if source not in extensions:
        target = _build(source, *_of_torch_and_python())
        loader = ExtensionFileLoader(source.stem, str(target))
        spec = ModuleSpec(source.stem, loader, origin=str(target))
        try:
            extensions[source] = loader.create_module(spec)
        except ImportError as error:
            raise BackendError(f"backend='cpp': {target} does not load: {error}") from error
    return extensions[source]


def _of_torch_and_python() -> list[str]:
    """What the compiler is told of the headers and libraries that an extension needs."""
    root = Path(torch.__file__).parent
    headers = [str(root / folder) for folder in HEADERS] + [sysconfig.get_path("include")]
    system = [f"-isystem{folder}" for folder in headers]  # warns of nothing in them
    return [*system, f"-L{root / 'lib'}", *(f"-l{name}" for name in LIBRARIES)]


def _build(source: Path, *options: str) -> Path:
    """Where the shared object of `source` lies, made where it is not there yet."""
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
                _compile(compiler, source, target, options)
    return target


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _compile(compiler: str, source: Path, target: Path, options: Sequence[str]) -> None:
    print(f"compiling {source.name} once, some seconds, into {target}", file=sys.stderr, flush=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, f"-I{SHARED}", str(source), "-o", str(unfinished), *options]
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
    compiled = (*FLAGS, os.path.realpath(compiler), torch.__version__, sys.version)
    facts = (*compiled, platform.machine(), _cpu())
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
