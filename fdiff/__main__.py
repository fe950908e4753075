"""`python -m fdiff` is the command `fdiff`."""

import sys

from fdiff.commands.main import main

sys.exit(main())
