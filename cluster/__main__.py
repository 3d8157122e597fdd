"""The command line: `python -m cluster`, installed as `tandem`.

Exit codes: 0 clean, 1 something failed while running, 2 the topology or the command cannot work (the message says why).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from cluster.commands import check, status, up
from protocol.errors import ConfigError, TandemError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except ConfigError as error:
        print(f"tandem: {error}", file=sys.stderr)
        return 2
    except TandemError as error:
        print(f"tandem: {error}", file=sys.stderr)
        return 1


def run() -> NoReturn:
    """Run the command line's command and end the process, whatever threads of Ray's are still in the midst of."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody may be there to read it
            stream.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem", description="Serve a large language model with prefill and decode on different workers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (up, check, status):
        command.add(commands)
    return parser


if __name__ == "__main__":
    run()
