"""`dsv4`: checkpoints and chat text from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dsv4_plugin.cli import chat, checkpoint, gpu_check, parse, plan, render

COMMANDS = {
    "checkpoint": (checkpoint, "make checkpoints"),
    "plan": (plan, "what fits on which GPUs"),
    "gpu-check": (gpu_check, "check and time every kernel on this GPU"),
    "chat": (chat, "talk to a server or the local engine"),
    "render": (render, "messages to prompt text and ids"),
    "parse": (parse, "model output to a message"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `dsv4` command; user errors are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="dsv4", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError, ModuleNotFoundError, NotImplementedError) as error:
        print(f"dsv4: {error}", file=sys.stderr)
        return 2
