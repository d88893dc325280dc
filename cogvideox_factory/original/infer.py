"""Their script of this name: `cogvideox generate --original infer`."""

import sys

from cogvideox_factory.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", "--original", "infer", *sys.argv[1:]]))
