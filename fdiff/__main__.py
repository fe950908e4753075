"""`python -m fdiff` is the command `fdiff`."""

import sys

from fdiff.cli import main

sys.exit(main())
