"""A page in headless Chromium, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_QUIET = ("--no-first-run", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
          "--disable-sync", "--disable-quic")  # fmt: skip


def shown(page: Path, profile: Path) -> tuple[str, list[str]]:
    """Return the document as the browser holds it once loaded, and what it wrote on its console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", *_QUIET, f"--user-data-dir={profile}", "--enable-logging=stderr",
         "--virtual-time-budget=3000", "--dump-dom", page.resolve().as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)
