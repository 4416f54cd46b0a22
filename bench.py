"""Time an operator or a mixer beside its peers: `python bench.py op=<operator>`; see --help."""

import os

# Before torch is imported: its allocator warns of blocks older than the measuring of a peak.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from omegaconf import DictConfig

from schema.entry import command

WIDTH = 130  # columns that a row needs


def run(cfg: DictConfig) -> None:
    """Measure what `cfg` asks for; print a table, write a CSV file and a picture.

    Raises:
        ConfigError: an unknown name or an impossible number; nothing was measured.
    """
    # Torch takes seconds to import, which a mistake on the command line need not wait for.
    from dataclasses import fields
    from pathlib import Path

    import torch
    from omegaconf import OmegaConf
    from rich.console import Console

    from benchmarks.bench import Plan, bench
    from benchmarks.results import plot, print_rows, write_csv
    from benchmarks.suites import suite
    from evaluation.load import choose_device
    from records.folder import new_path
    from records.machine import git_commit, machine, versions
    from training.pages import keep_freed_pages

    options = OmegaConf.to_container(cfg)
    if cfg.suite is None:
        plans = [Plan(**{f.name: options[f.name] for f in fields(Plan)})]  # type: ignore[index]
    else:
        plans = suite(cfg.suite, cfg.rounds, cfg.max_spread)
    device = choose_device(cfg.accelerator)
    if cfg.keep_pages:
        keep_freed_pages()
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, WIDTH))
    folder = Path(cfg.out) if cfg.out else new_path("bench", cfg.suite or plans[0].subject)
    here, commit = machine(), git_commit() or {}
    facts = {
        "device": here["accelerators"][0] if device.type == "cuda" else here["cpu"],
        "simd": " ".join(here["simd"]),
        "threads": torch.get_num_threads(),
        "torch": versions()["torch"],
        "commit": commit.get("commit", ""),
        "dirty": commit.get("dirty", ""),
    }
    for plan in plans:
        with console.status("") as status:
            rows = bench(plan, device, status.update)
        own = {"subject": plan.subject, "dtype": plan.dtype, **facts}
        title = f"{plan.subject}, {plan.dtype}, {facts['device']}, {facts['threads']} threads"
        print_rows(rows, title, console)
        out = folder if cfg.suite is None else folder / f"{plan.subject}-{plan.dtype}"
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "bench.csv", rows, own)
        plot(out / "bench.png", rows, title)
    console.print(f"written to {folder}: bench.csv, bench.png")


if __name__ == "__main__":
    command(run, "bench")()
