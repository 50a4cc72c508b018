"""python -m rkl: the program rkl where it is not on the path."""

import sys

from rkl.cli import main

if __name__ == "__main__":
    sys.exit(main())
