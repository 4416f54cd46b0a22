"""Look for good options: `python search.py 'overrides=[...]' 'space={...}' out=<folder>`."""

from omegaconf import DictConfig

from schema.entry import command


def run(cfg: DictConfig) -> None:
    """Run the trials that are missing; print all of them and the command of the best.

    Raises:
        ConfigError: the space or a trial cannot be; nothing was run.
    """
    from omegaconf import OmegaConf

    from training.search import Plan, search

    search(Plan(**OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]


if __name__ == "__main__":
    command(run, "search")()
