# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs a script that does not outlive the process that started it.

    python -m diffusers_msd.lifeline script.py arguments

Standard input is the lifeline: a pipe whose other end the parent holds. When the parent closes it, or dies however it
may, the script gets SIGTERM, at which the trainer finishes its step and writes a checkpoint.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path


# Seconds from SIGTERM to the end of a script that does not follow it.
GRACE = 120


def _watch():
    # No sys.stdin: its lock, held by this thread, would be missed when Python ends.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def main():
    threading.Thread(target=_watch, daemon=True).start()
    sys.argv = sys.argv[1:]
    # Scripts import their neighbours.
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
