"""Entry point for `ray job submit`: the same code as `clipdist evaluate`."""

import sys

from clipdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
