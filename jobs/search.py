"""Entry point for `ray job submit`: the same code as `clipdist search`."""

import sys

from clipdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
