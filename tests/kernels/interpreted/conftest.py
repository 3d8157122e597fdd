"""Without the interpreter there is nothing to collect here; ../test_interpreted.py starts a process that has it."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
