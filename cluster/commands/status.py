"""`tandem status`: the workers of a running cluster as a table, or as the router's own JSON."""

import argparse
from collections.abc import Sequence
from typing import Any

from cluster.status_client import WorkerStatus, fetch_raw, parse_status

_HEADER = (
    *(
        "ROLE",
        "GROUP",
        "RANK",
        "PID",
        "NODE",
        "STATE",
        "EPOCH",
        "BLOCKS",
        "TOKENS EACH",
        "FREE",
        "CACHED",
        "HELD",
        "RUN",
        "WAIT",
    ),
    "KV OVER",
)


def add(commands: Any) -> None:
    """Describe the command to argparse."""
    parser = commands.add_parser("status", help="list the workers of a running cluster")
    parser.add_argument("--router", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print what the router says, unchanged")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table or the JSON; TandemError when no router answers."""
    body = fetch_raw(arguments.router)
    if arguments.json:
        print(body.decode())
        return 0
    rows = [_row(worker) for worker in parse_status(body, arguments.router).workers]
    print(format_table([_HEADER, *rows]) if rows else "no worker has joined yet")
    return 0


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows with every column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _row(worker: WorkerStatus) -> tuple[str, ...]:
    """Only a leader counts blocks, requests and connections, for its whole group; other ranks' cells stay blank."""
    state = f"{worker.state}: {worker.doing}" if worker.state == "starting" and worker.doing else worker.state
    who = (worker.role, worker.group, worker.rank, worker.pid, worker.node, state, worker.epoch)
    blocks = worker.blocks
    held = (blocks.total, worker.block_size, blocks.free, blocks.cached, blocks.held)
    load = (*held, worker.running, worker.waiting, " ".join(worker.transports))
    return tuple(str(cell) for cell in (*who, *(load if worker.rank == 0 else [""] * len(load))))
