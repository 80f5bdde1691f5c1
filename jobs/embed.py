"""Entry point for `ray job submit`: the same code as `clipdist embed`."""

import sys

from clipdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
