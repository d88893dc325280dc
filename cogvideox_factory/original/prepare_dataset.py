"""Their script of this name: `cogvideox prepare --original prepare-dataset`."""

import sys

from cogvideox_factory.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "--original", "prepare-dataset", *sys.argv[1:]]))
