"""A comparison as files: one page that needs no network, tables and figures."""

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from analysis.comparison import Compared, Comparison
from analysis.details import details
from analysis.figures import Drawn, draw, plotting
from analysis.figures.style import save
from analysis.method import method_notes
from analysis.sections import Settings
from analysis.tables import Column, caption, columns, latex, markdown, rows_csv, runs_csv
from records.atomic import atomic_file, write_text

REPORT = "report.html"
_PAGE = Path(__file__).parent / "page"


def write_report(comparison: Comparison, out: Path) -> Path:
    """Write report.html, tables.md, tables.tex, rows.csv, runs.csv and figures/ into `out`.

    The same run folders give the same bytes: nothing depends on the time, the order of the file
    system or `out`.

    Returns:
        The path of report.html.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    parts = []
    with plotting():
        for i, compared in enumerate(comparison.sections):
            drawn = draw(compared)
            pictures = {each.name: save(each.figure, "svg") for each in drawn}
            for each in drawn:
                name = f"{i + 1}_{compared.section.task}_{each.name}"
                _write(out / "figures" / f"{name}.svg", pictures[each.name])
                _write(out / "figures" / f"{name}.pdf", save(each.figure, "pdf"))
            parts.append(_section(compared, drawn, pictures))
    write_text(out / "tables.md", markdown(comparison))
    write_text(out / "tables.tex", latex(comparison))
    write_text(out / "rows.csv", rows_csv(comparison))
    write_text(out / "runs.csv", runs_csv(comparison))
    path = out / REPORT
    write_text(path, _page(comparison, parts))
    return path


def report_folder(roots: Sequence[str]) -> Path:
    """report/ in the first of `roots`, or where its pattern starts."""
    root = Path(roots[0]).expanduser()
    while not root.is_dir():
        root = root.parent
    return root / "report"


def report_command(comparison: Comparison) -> str:
    """The command line that makes the report, but for where it is put."""
    chosen, usual = comparison.settings, Settings()
    roots = comparison.roots
    words = [f"runs={roots[0]}" if len(roots) == 1 else f"runs=[{','.join(roots)}]"]
    for key in ("metric", "protocol", "baseline", "interval"):
        if getattr(chosen, key) != getattr(usual, key):
            words.append(f"{key}={getattr(chosen, key)}")
    if chosen.tuned != usual.tuned:
        words.append(f"tuned=[{','.join(chosen.tuned)}]")
    return shlex.join(["python", "compare.py", *words])


def _page(comparison: Comparison, parts: Sequence[str]) -> str:
    several = len(comparison.sections) > 1
    answers = "".join(
        f'<p class="answer">{_task(each) if several else ""}{escape(each.headline)}</p>'
        for each in comparison.sections
    )
    style, script = ((_PAGE / name).read_text("utf-8") for name in ("style.css", "script.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(", ".join(each.section.name for each in comparison.sections))}: comparison</title>
<style>
{style}</style>
</head>
<body>
<h1>{escape(_what(comparison))}</h1>
{answers}
{_problems(comparison.problems)}
{"".join(parts)}
<h2>How the numbers are made</h2>
<ul class="notes">{_items(method_notes(comparison))}</ul>
<p class="notes">This page: <code>{escape(report_command(comparison))}</code></p>
<script>
{script}</script>
</body>
</html>
"""


def _task(compared: Compared) -> str:
    return f'<span class="task">{escape(compared.section.name)}</span>'


def _what(comparison: Comparison) -> str:
    runs = sum(len(each.section.runs) for each in comparison.sections)
    rows = sum(len(each.section.rows) for each in comparison.sections)
    return f"A comparison of {rows} configurations over {runs} runs"


def _problems(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f'<div class="problems">To be known of these runs:<ul>{_items(lines)}</ul></div>'


def _section(compared: Compared, drawn: Sequence[Drawn], pictures: Mapping[str, bytes]) -> str:
    figures = "".join(_figure(each, pictures[each.name]) for each in drawn)
    note = compared.section.evaluation.get("note")
    return f"""<section>
<h2>{escape(compared.section.name)}</h2>
{_table(compared)}
<p class="caption">{escape(caption(compared))} {escape(note or "")} A row's name opens its runs,
their commands and the configuration.</p>
<ul class="sentences">{_items(compared.sentences)}</ul>
{figures}</section>
"""


def _table(compared: Compared) -> str:
    shown = columns(compared)
    heads = "".join(
        f'<th{_class(column)}><button type="button">{escape(column.title)}</button></th>'
        for column in shown
    )
    bodies = []
    for row in compared.section.rows:
        cells = []
        for column in shown:
            text = escape(column.text(row))
            value = column.value(row) if column.value else column.text(row)
            if column is shown[0]:
                text = f'<button type="button" class="row-name">{text}</button>'
            cells.append(f'<td{_class(column, "runs")} data-value="{_value(value)}">{text}</td>')
        mark = " reference" if row is compared.section.reference else ""
        bodies.append(
            f'<tbody>\n<tr class="row{mark}">{"".join(cells)}</tr>\n'
            f'<tr class="details"><td colspan="{len(shown)}">{details(row, compared)}</td></tr>\n'
            "</tbody>"
        )
    return (
        f'<div class="scroll"><table class="rows">\n<thead><tr>{heads}</tr></thead>\n'
        + "\n".join(bodies)
        + "\n</table></div>"
    )


def _class(column: Column, counts: str = "") -> str:
    """Of a head or cell; `counts` is added to the one that may have words beside its number."""
    names = ["number"] if column.value else []
    names += ["flags"] if column.title == "flags" else []
    names += [counts] if column.title == "n" and counts else []
    return f' class="{" ".join(names)}"' if names else ""


def _value(value: Any) -> str:
    return "" if value is None else escape(str(value))


def _figure(drawn: Drawn, svg: bytes) -> str:
    data = base64.b64encode(svg).decode()
    return f"""<h3>{escape(drawn.title)}</h3>
<figure><img alt="{escape(drawn.title)}" src="data:image/svg+xml;base64,{data}">
<figcaption class="caption">{escape(drawn.caption)}</figcaption></figure>
"""


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)
