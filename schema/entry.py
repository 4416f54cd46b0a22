"""A function of a configuration as a command: Hydra's command line, checked before it runs."""

import functools
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, open_dict

from records.points import point_name
from schema.compose import CONF, VERSION_BASE, compose, compose_all, register_mixers
from schema.errors import ConfigError
from schema.names import check_pattern

EXIT_CODE = 2  # of a command line that asks for something impossible, as of argparse


def command(main: Callable[[DictConfig], None], config_name: str) -> Callable[[], None]:
    """`main` as what `python <file>.py [key=value] ...` runs.

    Everything that the command line asks for, every point of a sweep included, is composed and
    checked first. What is wrong, there or where `main` raises ConfigError, is one line on stderr
    and exit code 2; nothing has been written unless `main` did. In a sweep the other points run.

    `main` gets a checked configuration, whose run_dir is set in a sweep.
    """

    @functools.wraps(main)
    def job(cfg: DictConfig) -> None:
        from schema.check import check, check_here  # see _check_command_line

        in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        try:
            check(cfg, config_name)  # again: a launcher may have brought it to another machine
            check_here(cfg)
            if in_sweep and "run_dir" in cfg and cfg.run_dir is None:
                point = HydraConfig.get()
                with open_dict(cfg):
                    cfg.run_dir = str(Path(point.sweep.dir) / point_name(point.overrides.task))
            main(cfg)
        except ConfigError as error:
            if in_sweep:
                raise
            _end(error)

    @functools.wraps(main)
    def run() -> None:
        try:
            _check_command_line(get_args_parser().parse_args(), config_name)
            # Hydra would wrap what a point of a sweep raised in several lines.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            register_mixers()
            hydra.main(version_base=VERSION_BASE, config_path=str(CONF), config_name=config_name)(
                job
            )()
        except ConfigError as error:
            _end(error)

    return run


def _check_command_line(arguments: Namespace, config_name: str) -> None:
    """Compose, and check if it is to be run, all that the command line asks for."""
    if arguments.shell_completion or arguments.hydra_help:
        return
    if arguments.help or arguments.cfg or arguments.info:
        compose(config_name, arguments.overrides)
        return
    wanted = list(compose_all(config_name, arguments.overrides, arguments.multirun))
    for cfg in wanted:
        if isinstance(cfg.get("pattern"), (str, ListConfig)):  # of another type: see check
            check_pattern(cfg.pattern, cfg.mixers)
    from schema.check import check, check_here  # imports torch: names are checked before

    for cfg in wanted:
        check(cfg, config_name)
        check_here(cfg)


def _end(error: ConfigError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_CODE)
