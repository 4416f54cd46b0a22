"""The points of a sweep: a folder for each, named by what it is, with point.json beside its run.

<sweep>/<point>/           the run folder, see records.folder
<sweep>/<point>/point.json what became of the point
<sweep>/<point>.log        what its process printed
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from records.atomic import write_json

PointStatus = Literal["running", "finished", "failed", "interrupted"]
FILE = "point.json"
SWEEP = "SEQMIX_SWEEP"  # environment of a point's process: the name of its sweep
LONGEST_NAME, LONGEST_VALUE = 80, 40
FIRST = ("pattern", "seed", "optimizer.lr")
# What a point is does not depend on these.
_ELSEWHERE = re.compile(r"^(run_dir|data\.|logger[.=]|sweep=|hydra[./])")


@dataclass
class Point:
    """What became of a point.

    Attributes:
        error: one line; None unless it failed.
        overrides: what train.py was told.
        command: the same as a command line.
    """

    status: PointStatus
    overrides: list[str] = field(default_factory=list)
    command: str = ""
    error: str | None = None

    def write(self, folder: Path) -> None:
        """Save it in the point's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, asdict(self))


def read_point(folder: Path) -> Point | None:
    """What was saved in a point's folder; None where nothing was."""
    try:
        return Point(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def points(sweep: Path) -> dict[Path, Point]:
    """Every point of a sweep that was begun, in the order of the folders' names."""
    folders = sorted(path.parent for path in sweep.glob(f"*/{FILE}"))
    found = {folder: read_point(folder) for folder in folders}
    return {folder: point for folder, point in found.items() if point is not None}


def own_overrides(overrides: Sequence[str]) -> list[str]:
    """Those that make the point what it is, sorted."""
    return sorted(each for each in overrides if not _ELSEWHERE.match(each.lstrip("+")))


def point_name(overrides: Sequence[str]) -> str:
    """A folder name that is the same for the same overrides in any order, and for no others."""
    own = own_overrides(overrides)
    digest = hashlib.sha256("\n".join(own).encode()).hexdigest()[:8]
    parts = [override.partition("=") for override in own]
    # What sweeps are mostly about comes first; long values are the digest's business.
    parts.sort(key=lambda part: FIRST.index(part[0]) if part[0] in FIRST else len(FIRST))
    told = [f"{k.rsplit('.', 1)[-1]}-{v}" for k, _, v in parts if len(v) <= LONGEST_VALUE]
    told = [each.replace("e+", "e") for each in told]  # 1e+3 is not to look like 1e-3
    plain = [re.sub(r"[^A-Za-z0-9._]+", "-", each).strip("-") for each in told]
    name = "_".join(plain)[:LONGEST_NAME].strip("-_")
    return f"{name}-{digest}" if name else digest
