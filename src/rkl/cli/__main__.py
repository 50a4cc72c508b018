"""python -m rkl.cli: the program rkl where it is not on the path."""

import sys

from rkl.cli import main

sys.exit(main())
