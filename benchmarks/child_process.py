"""The other process of a measurement: a module of ours, told what to do on stdin, answering in lines on stdout."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

Child = subprocess.Popen[str]


@contextmanager
def child(module: str, *arguments: object) -> Iterator[Child]:
    """Run a module as a process of its own, which ends with the block.

    NCCL takes two ranks on one GPU only if they seem to be on different hosts, and then goes through its sockets: its
    row shows there that it works, not how fast it is.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    there = os.environ | {"NCCL_HOSTID": "receiver"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=there) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: Child) -> str:
    """Wait for a line of the process and return it."""
    assert process.stdout
    return process.stdout.readline().strip()
