"""`python -m cogvideox_factory.original docs/original.md`: write the tables of a page as the code has them."""

import sys
from pathlib import Path

from cogvideox_factory.original.page import update

if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(update(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
