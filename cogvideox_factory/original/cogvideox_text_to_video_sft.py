"""Their script of this name: `cogvideox train --original text-to-video-sft`."""

import sys

from cogvideox_factory.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--original", "text-to-video-sft", *sys.argv[1:]]))
