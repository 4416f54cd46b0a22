"""What a row of the report opens: its grid, its runs with their commands, its configuration."""

from collections.abc import Sequence
from html import escape

from analysis.comparison import Compared
from analysis.identity import differing, identity, plain
from analysis.numbers import rounded
from analysis.rows import Outcome, Row, Setting


def details(row: Row, compared: Compared) -> str:
    """HTML for one cell."""
    parts = []
    if row.leak_reason:
        parts.append(f"<p>Leaky: {escape(row.leak_reason)}</p>")
    parts += [f"<p>A point left no run: {escape(failure)}</p>" for failure in row.lost]
    if len(row.settings) > 1:
        parts.append(_grid(row))
    parts += [_runs(row), _changes(row, compared), _configuration(row)]
    return "\n".join(part for part in parts if part)


def _grid(row: Row) -> str:
    lines = []
    for setting in row.settings:
        value = setting.validation(row.shared_seeds)
        failed = f"; {len(setting.failed)} without a result" if setting.failed else ""
        lines.append(
            [
                setting.name,
                "-" if value is None else rounded(value),
                f"{len(setting.values)} of {len(setting.outcomes)}{failed}",
                "chosen" if setting is row.chosen else "",
            ]
        )
    seeds = ", ".join(map(str, row.shared_seeds))
    return _table(
        "The grid, chosen on validation and not on test",
        ["setting", f"mean validation score over seeds {seeds}", "runs", ""],
        lines,
    )


def _runs(row: Row) -> str:
    lines = [_run(outcome, setting) for setting in row.settings for outcome in setting.outcomes]
    return _table(
        "Runs", ["setting", "seed", "test", "validation", "commit", "folder and command"], lines
    )


def _run(outcome: Outcome, setting: Setting) -> list[str]:
    record = outcome.run.record
    git = record.get("git") or {}
    commit = f"{str(git.get('commit', '-'))[:9]}{', changed' if git.get('dirty') else ''}"
    test = outcome.failure if outcome.value is None else rounded(outcome.value)
    validation = "-" if outcome.validation is None else rounded(outcome.validation)
    return [
        setting.name or "-",
        str(outcome.run.seed),
        test,
        validation,
        commit,
        f"<code>{escape(str(outcome.run.path))}<br>{escape(str(record.get('command')))}</code>",
    ]


def _changes(row: Row, compared: Compared) -> str:
    reference = compared.section.reference
    if row is reference:
        return ""
    own, other = (identity(each.config, ()) for each in (row, reference))
    # Options of a mixer that only one of them has are differences that the pattern tells.
    keys = [key for key in differing([own, other]) if key in own and key in other]
    lines = [[key, str(own[key]), str(other[key])] for key in keys]
    return _table(f"Other than {reference.name}", ["key", row.name, reference.name], lines)


def _configuration(row: Row) -> str:
    config = row.chosen.outcomes[0].run.config
    lines = [f"{key}: {plain(config[key])}" for key in sorted(identity(config, ()))]
    text = escape("\n".join(lines))
    return f'<h4>Configuration</h4>\n<pre class="config">{text}</pre>'


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are text, but for those that are code already."""
    if not lines:
        return ""
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{cell if cell.startswith('<code>') else escape(cell)}</td>" for cell in line
        )
        + "</tr>\n"
        for line in lines
    )
    return f"<h4>{escape(title)}</h4>\n<table><thead><tr>{head}</tr></thead>\n{body}</table>"
