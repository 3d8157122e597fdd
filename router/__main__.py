"""`python -m router`: reads a RouterLaunch from stdin, answers with its addresses on stdout, logs to stderr.

Exit status 0 after a drain, 2 when what it was told cannot work. TANDEM_LOG_LEVEL sets the log level.
"""

import gc
import logging
import os
import resource
import sys

import uvloop

from protocol.errors import ConfigError
from router.front.free_memory import keep_large_blocks_apart
from router.launch import read_launch
from router.process import serve

MAX_OPEN_FILES = 1 << 17


def main() -> int:
    """Run the router; return the process's exit status."""
    gc.freeze()  # what was imported stays; to look at all of it takes some milliseconds in which no stream moves
    try:
        _allow_connections()
        keep_large_blocks_apart()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or texts of all threads wait in one line of the library's
        _begin_to_log(os.environ.get("TANDEM_LOG_LEVEL", "INFO").upper())
        uvloop.run(serve(read_launch(sys.stdin.fileno()), sys.stdin.fileno()))
    except ConfigError as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    return 0


def _allow_connections() -> None:
    """Every rank and every client is an open file, of which a process may have 1,024 on most machines until it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _begin_to_log(level: str) -> None:
    levels = logging.getLevelNamesMapping()
    if level not in levels:
        raise ConfigError(f"TANDEM_LOG_LEVEL is {level}; it can be {', '.join(levels)}")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s router %(name)s: %(message)s")
    logging.raiseExceptions = False  # a full disk or a closed pipe must cost log lines, never requests
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
