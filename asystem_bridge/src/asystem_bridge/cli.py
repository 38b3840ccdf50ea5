"""The command line: ``asystem-bridge loop``."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asystem_bridge.errors import BridgeError, ConfigError

RUNS_FOLDER = Path("runs")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for an error that the message explains, 130 when interrupted."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _loop(options)
    except BridgeError as error:
        print(f"asystem-bridge: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"asystem-bridge: {error}. Make room and go on with --resume: the last checkpoint is "
            "whole",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("asystem-bridge: interrupted; every process has ended", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    from asystem_bridge.config import PRESETS

    parser = argparse.ArgumentParser(prog="asystem-bridge", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    loop = commands.add_parser(
        "loop",
        help="train with Megatron, roll out with vLLM",
        description="Train with Megatron, roll out with vLLM under a token budget, sync, check.",
    )
    source = loop.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, metavar="FILE.toml", help="configuration file")
    source.add_argument(
        "--preset", choices=PRESETS, default="smollm2", help="built-in configuration (%(default)s)"
    )
    loop.add_argument("--steps", type=int, help="iterations in all (run.steps)")
    loop.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of the run"
    )
    loop.add_argument("--output", type=Path, metavar="DIR", help="run folder (a new one in runs/)")
    loop.add_argument("--tp", type=int, help="tensor-parallel trainer ranks")
    loop.add_argument("--dp", type=int, help="data-parallel trainer ranks")
    loop.add_argument(
        "--print-config", action="store_true", help="print the configuration's text and stop"
    )
    return parser


def _loop(options: argparse.Namespace) -> None:
    from asystem_bridge.config import load_config, preset_text
    from asystem_bridge.controller.run_directory import choose_run_path

    if options.config is None:
        origin, text = f"preset {options.preset}", preset_text(options.preset)
    else:
        origin, text = str(options.config), _read(options.config)
    if options.print_config:
        print(text, end="")
        return
    overrides = _overrides(options)
    config = load_config(text, origin=origin, overrides=overrides)
    text += "".join(
        f"# from the command line: {section}.{key} = {value}\n"
        for section, values in overrides.items()
        for key, value in values.items()
    )
    run_path = options.output or choose_run_path(RUNS_FOLDER, config.name, resume=options.resume)

    from asystem_bridge.controller.run import run_loop  # imports torch

    run_loop(config, text, run_path, resume=options.resume)


def _overrides(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    given = {
        "run": {"steps": options.steps},
        "trainer": {"tensor_parallel_size": options.tp, "data_parallel_size": options.dp},
    }
    return {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in given.items()
    }


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
