"""Entry point for `ray job submit`: the same code as `clipdist mine`."""

import sys

from clipdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["mine", *sys.argv[1:]]))
