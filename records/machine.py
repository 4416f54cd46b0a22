"""What a run was made by and on: command, commit, versions, machine."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "numpy", "triton", "tokenizers")
SIMD = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve")


def command() -> str:
    """The command line of this process, as a shell would take it."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def versions() -> dict[str, str]:
    """Of Python and of the installed packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> dict[str, Any] | None:
    """Commit of the source tree, and whether files differ from it; None for an installed copy."""
    if not (SOURCE / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return None


def machine() -> dict[str, Any]:
    """Processor, its vector units, cores this process may use, memory in bytes, accelerators."""
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpuinfo.get("model name", platform.processor()),
        "simd": [name for name in SIMD if name in flags],
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "accelerators": [
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ],
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(SOURCE), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return result.stdout.strip()


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    entry = path.read_text(errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in entry.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
