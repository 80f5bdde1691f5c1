"""Entry point for `ray job submit`: the same code as `clipdist prepare`."""

import sys

from clipdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
