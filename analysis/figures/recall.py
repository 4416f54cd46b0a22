"""Where recall ends: accuracy over the two things that make an example hard."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.comparison import Compared
from analysis.rows import Row

_NO_DIFFICULTY = {"num_examples", "stage", "name", "chance"}
_LABELS = {"seq_len": "length, tokens", "num_kv_pairs": "key-value pairs"}
_PER_LINE = 5


def draw_recall(compared: Compared) -> tuple[str, str, str, Figure] | None:
    """None where the task is no recall task, or its slices differ in more than two options."""
    section = compared.section
    rows = [row for row in section.rows if row.estimate is not None]
    evaluation = section.evaluation
    if not rows or evaluation.get("kind") != "recall":
        return None
    where = _coordinates(section.runs[0].data)
    if where is None:
        return None
    (x_name, xs), (y_name, ys), places = where
    panels = [(row.name, _accuracy(row)) for row in rows]
    panels.append(("chance", {s["slice"]: s["chance"] for s in evaluation["slices"]}))
    columns = min(_PER_LINE, len(panels))
    lines = -(-len(panels) // columns)
    size = (1.4 + 1.75 * columns, 0.5 + lines * (0.9 + 0.45 * len(ys)))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    image = None
    for i, (panel, (name, scores)) in enumerate(zip(axes.flat, panels, strict=False)):
        image = _draw(panel, scores, places, (len(ys), len(xs)))
        panel.set_title(name, fontweight="normal" if name == "chance" else "bold")
        panel.set_xticks(range(len(xs)), xs)
        panel.set_yticks(range(len(ys)), ys if i % columns == 0 else [""] * len(ys))
        if i % columns == 0:
            panel.set_ylabel(y_name)
        if i + columns >= len(panels):
            panel.set_xlabel(x_name)
    assert image is not None
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.85, pad=0.015)
    caption = (
        "Accuracy on each slice of the test, mean over seeds. Chance is that of "
        f"{evaluation['guess']}."
    )
    return "recall", "Where recall ends", caption, figure


Axis = tuple[str, list]  # its label, and the values along it


def _coordinates(
    data: Mapping[str, Any],
) -> tuple[Axis, Axis, dict[str, tuple[int, int]]] | None:
    """Both axes, and the (line, column) of every test slice by its name."""
    slices: Sequence[Mapping[str, Any]] = data["splits"]["test"].get("slices", [])
    keys = [
        key
        for key in (slices[0] if slices else ())
        if key not in _NO_DIFFICULTY and len({str(s.get(key)) for s in slices}) > 1
    ]
    if not slices or len(keys) > 2:
        return None
    x_key = "num_kv_pairs" if "num_kv_pairs" in keys or not keys else keys[-1]
    y_key = next((key for key in keys if key != x_key), "seq_len")
    xs, ys = (sorted({s.get(key, 0) for s in slices}, key=_order) for key in (x_key, y_key))
    places = {s["name"]: (ys.index(s.get(y_key, 0)), xs.index(s.get(x_key, 0))) for s in slices}
    labels = [_LABELS.get(key, key.replace("_", " ")) for key in (x_key, y_key)]
    return (labels[0], xs), (labels[1], ys), places


def _order(value: Any) -> tuple:
    return (isinstance(value, str), value)


def _accuracy(row: Row) -> dict[str, float]:
    """Mean over seeds by slice."""
    parts = [o.run.evaluation["slices"] for o in row.chosen.outcomes if o.run.evaluation]
    return {
        same[0]["slice"]: float(np.mean([s["sequence_accuracy"] for s in same]))
        for same in zip(*parts, strict=True)
    }


def _draw(
    axes: Axes,
    scores: Mapping[str, float],
    places: Mapping[str, tuple[int, int]],
    shape: tuple[int, int],
) -> Any:
    grid = np.full(shape, np.nan)
    for name, value in scores.items():
        grid[places[name]] = value
    axes.set_facecolor("#f1f1f1")  # of what was not measured
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "black" if value > 0.55 else "white"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image
