"""`dsv4`: checkpoints and chat text from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "checkpoint": "make checkpoints, convert or inspect them",
    "plan": "what fits on which GPUs",
    "gpu-check": "check and time every kernel on this GPU",
    "bench": "latency and throughput of a running server",
    "chat": "talk to a server or the local engine",
    "render": "messages to prompt text and ids",
    "parse": "model output to a message",
}
"""Each is a module here; only that of the command that runs is imported, because torch takes
seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `dsv4` command; user errors are one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="dsv4", description=__doc__)
    parser.add_argument("--version", action="version", version=f"dsv4 {version('dsv4-plugin')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in argv[:1]:
            module = import_module(f"dsv4_plugin.tools.cli.{name.replace('-', '_')}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError, ModuleNotFoundError, NotImplementedError) as error:
        print(f"dsv4: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells have it


def sentence(error: BaseException) -> str:
    """What is wrong, on one line; of the system's errors the file first."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split())
