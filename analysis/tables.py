"""The rows of a comparison as Markdown, LaTeX, CSV and on the console."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from analysis.budget import flags
from analysis.comparison import Compared, Comparison
from analysis.differences import Difference, p_text
from analysis.numbers import decimals, fixed, short, with_interval
from analysis.rows import Row


@dataclass(frozen=True)
class Column:
    """`text` is what is shown of a row and `value` what it is sorted by, None for nothing."""

    title: str
    text: Callable[[Row], str]
    value: Callable[[Row], Any] | None = None


def columns(compared: Compared) -> list[Column]:
    """Those of every printed table; numbers are those that have a `value`."""
    section, reference = compared.section, compared.section.reference
    length = reference.costs.length

    def cost(key: str, unit: str = "") -> dict[str, Callable]:
        return {
            "text": lambda row: short(getattr(row.costs, key), unit),
            "value": lambda row: getattr(row.costs, key),
        }

    return [
        Column("row", lambda row: row.name),
        Column(section.metric.title, _score, lambda row: row.estimate and row.estimate.mean),
        Column("n", _runs, lambda row: row.estimate.n if row.estimate else 0),
        Column("SD", _spread, lambda row: row.estimate and row.estimate.spread),
        Column(
            f"minus {reference.name}",
            lambda row: _change(compared.to_reference(row), row is reference),
            lambda row: _mean(compared.to_reference(row), row is reference),
        ),
        Column(
            "p (Holm)",
            lambda row: _p(compared.to_reference(row)),
            lambda row: (d := compared.to_reference(row)) and d.adjusted,
        ),
        Column("parameters", **cost("parameters")),
        Column("FLOPs/token", **cost("flops_per_token")),
        Column(f"state at T={length}", **cost("state_bytes", "B")),
        Column("tokens seen", **cost("tokens")),
        Column("tuned", tuned),
        Column("flags", lambda row: "; ".join(flags(row, section)) or "-"),
    ]


def tuned(row: Row) -> str:
    """How many settings were tried, and which was chosen on validation."""
    if len(row.settings) == 1:
        return row.chosen.name or "-"
    return f"{row.chosen.name} (of {len(row.settings)})"


def markdown(comparison: Comparison) -> str:
    """Every section with its answer; each table in GitHub's syntax."""
    parts = []
    for compared in comparison.sections:
        shown = columns(compared)
        lines = [
            f"## {compared.section.name}",
            "",
            compared.headline,
            "",
            _pipes(_plain(column.title) for column in shown),
            _pipes("---:" if column.value else "---" for column in shown),
            *(_pipes(_plain(c.text(row)) for c in shown) for row in compared.section.rows),
            "",
            caption(compared),
        ]
        parts.append("\n".join(lines))
    problems = "".join(f"\n- {line}" for line in comparison.problems)
    return "\n\n".join(parts) + "\n" + (f"\nNot as it should be:\n{problems}\n" if problems else "")


def latex(comparison: Comparison) -> str:
    """One table for each section, for a document that uses booktabs and graphicx."""
    parts = []
    for compared in comparison.sections:
        shown = columns(compared)
        rows = [" & ".join(_tex(c.text(row)) for c in shown) for row in compared.section.rows]
        parts.append(
            "\n".join(
                [
                    "\\begin{table}",
                    "  \\centering",
                    f"  \\caption{{{_tex(caption(compared))}}}",
                    "  \\resizebox{\\linewidth}{!}{%",
                    f"  \\begin{{tabular}}{{{''.join('r' if c.value else 'l' for c in shown)}}}",
                    "    \\toprule",
                    f"    {' & '.join(_tex(column.title) for column in shown)} \\\\",
                    "    \\midrule",
                    *(f"    {row} \\\\" for row in rows),
                    "    \\bottomrule",
                    "  \\end{tabular}}",
                    "\\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def rich_table(compared: Compared) -> Table:
    """For the console, without the flags, which are `remarks`."""
    table = Table(
        title=compared.section.name,
        title_justify="left",
        title_style="bold",
        caption=caption(compared),
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
    )
    shown = columns(compared)[:-1]
    for column in shown:
        name = column is shown[0]
        table.add_column(column.title, justify="right" if column.value else "left", no_wrap=name)
    for row in compared.section.rows:
        table.add_row(*(column.text(row) for column in shown))
    return table


def remarks(compared: Compared) -> list[str]:
    """The flags of each row that has some, in a line."""
    section = compared.section
    told = {row.name: "; ".join(flags(row, section)) for row in section.rows}
    return [f"{name}: {line}" for name, line in told.items() if line]


def caption(compared: Compared) -> str:
    """What the numbers of the table are."""
    section = compared.section
    direction = "higher" if section.metric.higher_is_better else "lower"
    boots = any(r.estimate and r.estimate.method.startswith("boot") for r in section.rows)
    interval = "Student's t, or a bootstrap from 8 seeds on," if boots else "Student's t"
    return (
        f"{section.metric.title[0].upper()}{section.metric.title[1:]} on the test split of "
        f"{section.task}, {direction} is better: mean over seeds ± half of the 95% interval "
        f"({interval} over n seeds), SD between seeds.{_corrected(compared)}"
    )


def _corrected(compared: Compared) -> str:
    tests = len(compared.differences)
    if not tests:
        return ""
    number = "one comparison" if tests == 1 else f"{tests} comparisons"
    return f" p: adjusted by Holm for {number}; flags: against {compared.section.reference.name}."


def rows_csv(comparison: Comparison) -> str:
    """One line for each row of each section, numbers unrounded."""
    lines = []
    for compared in comparison.sections:
        for row in compared.section.rows:
            lines.append({**_row_facts(compared, row), **_difference_facts(compared, row)})
    return _csv(lines)


def runs_csv(comparison: Comparison) -> str:
    """One line for each run: where it is, what became of it, and the command that made it."""
    lines = []
    for compared in comparison.sections:
        for row in compared.section.rows:
            for setting in row.settings:
                for outcome in setting.outcomes:
                    record = outcome.run.record
                    lines.append(
                        {
                            "section": compared.section.name,
                            "row": row.name,
                            "setting": setting.name,
                            "chosen": setting is row.chosen,
                            "seed": outcome.run.seed,
                            "metric": compared.section.metric.name,
                            "test": outcome.value,
                            "validation": outcome.validation,
                            "failure": outcome.failure,
                            "folder": outcome.run.path,
                            "commit": (record.get("git") or {}).get("commit"),
                            "command": record.get("command"),
                        }
                    )
    return _csv(lines)


def _row_facts(compared: Compared, row: Row) -> dict[str, Any]:
    section, estimate, costs = compared.section, row.estimate, row.costs
    return {
        "section": section.name,
        "task": section.task,
        "data": section.data,
        "row": row.name,
        "metric": section.metric.name,
        "mean": estimate and estimate.mean,
        "sd": estimate and estimate.spread,
        "low": estimate and estimate.low,
        "high": estimate and estimate.high,
        "interval": estimate and estimate.method,
        "n": estimate.n if estimate else 0,
        "runs": row.attempted,
        "diverged": row.diverged,
        "failed": row.failures - row.diverged,
        "unfinished": len(row.chosen.unfinished),
        "parameters": costs.parameters,
        "flops_per_token": costs.flops_per_token,
        "state_bytes": costs.state_bytes,
        "length": costs.length,
        "tokens": costs.tokens,
        "tokens_per_second": costs.throughput,
        "machine": costs.machine,
        "settings": len(row.settings),
        "chosen": row.chosen.name,
        "grid": "; ".join(setting.name for setting in row.settings),
        "leak": row.leak_reason,
        "flags": "; ".join(flags(row, section)),
    }


def _difference_facts(compared: Compared, row: Row) -> dict[str, Any]:
    found = compared.to_reference(row)
    seeds, texts = (found.seeds, found.documents) if found else (None, None)
    return {
        "reference": compared.section.reference.name,
        "difference": seeds and seeds.mean,
        "difference_low": seeds and seeds.low,
        "difference_high": seeds and seeds.high,
        "difference_method": seeds and seeds.method,
        "p_seeds": seeds and seeds.p,
        "documents": texts and texts.n,
        "nats_per_token": texts and texts.mean,
        "nats_per_token_low": texts and texts.low,
        "nats_per_token_high": texts and texts.high,
        "p_documents": texts and texts.p,
        "p": found and found.p,
        "p_holm": found and found.adjusted,
        "better": found and found.winner and found.winner.name,
    }


def _score(row: Row) -> str:
    return "no result" if row.estimate is None else with_interval(row.estimate)


def _runs(row: Row) -> str:
    n = row.estimate.n if row.estimate else 0
    missing = row.attempted - n
    if not missing:
        return str(n)
    parts = [
        (row.diverged, "diverged"),
        (row.failures - row.diverged, "failed"),
        (len(row.chosen.unfinished), "unfinished"),
    ]
    told = ", ".join(f"{number} {what}" for number, what in parts if number)
    return f"{n} of {row.attempted}; {told}"


def _spread(row: Row) -> str:
    if row.estimate is None or row.estimate.spread is None:
        return "-"
    return fixed(row.estimate.spread, decimals(row.estimate.spread))


def _change(found: Difference | None, is_reference: bool) -> str:
    if found is None:
        return "reference" if is_reference else "-"
    return with_interval(found.seeds, signed=True)


def _mean(found: Difference | None, is_reference: bool) -> float | None:
    return found.seeds.mean if found else (0.0 if is_reference else None)


def _p(found: Difference | None) -> str:
    return "-" if found is None or found.adjusted is None else p_text(found.adjusted)


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _pipes(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def _tex(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    for sign, command in {"±": "$\\pm$", "−": "$-$", "×": "$\\times$", "<": "$<$"}.items():
        text = text.replace(sign, command)
    return text
