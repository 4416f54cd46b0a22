"""Compare finished runs: `python compare.py runs=<folder> [baseline=...]`; see --help."""

from omegaconf import DictConfig

from schema.entry import command

WIDTH = 130  # columns that a row needs


def run(cfg: DictConfig) -> None:
    """Print a table and the answer, and write the report.

    Raises:
        ConfigError: there is no run, or no row or metric of that name; nothing was written.
    """
    # pandas, scipy and matplotlib take a second, which a mistake on the command line need not wait.
    from pathlib import Path

    from rich.console import Console
    from rich.text import Text

    from analysis.comparison import compare
    from analysis.report import report_folder, write_report
    from analysis.sections import Settings
    from analysis.tables import remarks, rich_table

    roots = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs)
    settings = Settings(cfg.metric, cfg.protocol, cfg.baseline, tuple(cfg.tuned), cfg.interval)
    comparison = compare(roots, settings)
    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, WIDTH))
    for line in comparison.problems:
        console.print(Text(line, style="yellow"))
    for each in comparison.sections:
        console.print(rich_table(each))
        for line in remarks(each):
            console.print(Text(line))
        console.print(Text(f"\n{each.headline}\n", style="bold"))
    path = write_report(comparison, Path(cfg.out) if cfg.out else report_folder(roots))
    console.print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    command(run, "compare")()
