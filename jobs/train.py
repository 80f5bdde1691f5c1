"""Entry point for `ray job submit`: the same code as `clipdist train`."""

import sys

from clipdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
