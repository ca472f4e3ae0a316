"""python -m demo: what `python dev.py demo` runs inside .venv/."""

from __future__ import annotations

import argparse
import signal
import sys

from devtools.errors import DevError

from .options import add_options


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo")
    parser.add_argument("--comfyui", required=True, help="folder with ComfyUI's main.py")
    add_options(parser)
    options = parser.parse_args()
    # ComfyUI's colours of latents come from its own modules.
    sys.path.append(options.comfyui)
    from .run import run_demo

    # As an exception it passes the with-blocks, which stop the server.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        page = run_demo(options)
    except DevError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"the report and the videos are in {page.parent}\nopen {page}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
