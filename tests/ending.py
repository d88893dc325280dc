"""Ending programs that a test has started and that have started others."""

import subprocess
import time


def ask_to_end(process: subprocess.Popen) -> None:
    """Ask a program that still runs as often as makes it kill what it started; one that has ended is left alone."""
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        process.terminate()
        time.sleep(0.3)
    process.kill()
    process.wait()
