"""Write a run as files other programs read: `python export.py run=<folder> to=<folder>`."""

from omegaconf import DictConfig

from schema.entry import command


def export_run(cfg: DictConfig) -> None:
    """Write the run `cfg.run` into the folder `cfg.to`.

    Raises:
        ConfigError: something is missing or does not fit; nothing was written.
    """
    # Torch takes seconds to import, which a mistake on the command line need not wait for.
    from pathlib import Path

    import torch
    from rich.console import Console

    from evaluation.load import load, point_to_data
    from models.exported import check_target, network_of, write_exported
    from records.folder import RunFolder
    from schema.check import plain
    from tasks.text.interchange import write_tokenizer
    from tasks.text.task import LanguageModelling

    target = Path(cfg.to).expanduser()
    check_target(target)
    folder = RunFolder.open(cfg.run)
    own = folder.config()
    point_to_data(own, cfg)
    trained = load(folder, cfg.checkpoint, own, torch.device("cpu"))
    tokenizer = (
        trained.task.store.tokenizer if isinstance(trained.task, LanguageModelling) else None
    )
    facts = {"task": trained.task.name, "checkpoint": trained.checkpoint.name}
    bos = None if tokenizer is None else tokenizer.bos
    write_exported(trained.model, network_of(plain(own)), target, bos=bos, facts=facts)
    if tokenizer is not None:
        write_tokenizer(tokenizer, target)
    console = Console(highlight=False, soft_wrap=True)
    for file in sorted(target.iterdir()):
        console.print(f"{file}, {file.stat().st_size:,} bytes")


def main(cfg: DictConfig) -> None:
    """The command."""
    export_run(cfg)


if __name__ == "__main__":
    command(main, "export")()
