"""`python -m cogvideox_factory COMMAND`, for launchers such as torchrun."""

import sys

from cogvideox_factory.attempt import record
from cogvideox_factory.cli import main

if __name__ == "__main__":
    sys.exit(record(main))
