#!/usr/bin/env python3
"""Everything a developer or a curious user needs: python dev.py setup | demo | test.

Needs only Python 3.10 or newer; setup makes .venv/ with the rest, and the
other two make sure of it.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

# A Python that is embedded in something does not look beside the script.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo.options import add_options, check_options, forwarded
from devtools.checks import run_checks
from devtools.environment import ROOT, set_up
from devtools.errors import DevError
from devtools.older_hosts import provide_older_hosts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="setup | demo | test")

    setup = commands.add_parser("setup", help="make .venv/ and, unless you have one, .comfyui/")
    demo = commands.add_parser("demo", help="run the shipped workflows in a headless ComfyUI")
    test = commands.add_parser(
        "test",
        help="lint, types and the whole test suite",
        description="Lint, types and the whole test suite; unknown arguments go to pytest.",
    )
    for command in (setup, demo, test):
        command.add_argument(
            "--comfyui",
            metavar="FOLDER",
            help="your own ComfyUI (default: COMFYUI_PATH, else a pinned one in .comfyui/)",
        )
    add_options(demo)
    test.add_argument("--quick", action="store_true", help="leave out tests marked slow")
    return parser


def _run_to_its_end(command: list[str]) -> int:
    """Run a command that stops what it started: a request to end is handed on and waited for."""
    process = subprocess.Popen(command, cwd=ROOT)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal sent it to both
            continue


def main(arguments: list[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "test":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        if options.command == "demo":
            check_options(options)
        environment = set_up(options.comfyui)
        if options.command == "demo":
            demo = [str(environment.python), "-m", "demo", "--comfyui", str(environment.comfyui)]
            return _run_to_its_end([*demo, *forwarded(options)])
        if options.command == "test":
            if not options.quick:
                provide_older_hosts(environment.pip("python dev.py test"))
            return run_checks(environment, rest, quick=options.quick)
    except DevError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        owned = DevError(str(error), "check who owns this folder, or clone it to one of yours")
        print(f"error: {owned}", file=sys.stderr)
        return 1
    print(f"ready: {environment.python} and ComfyUI in {environment.comfyui}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
