"""`python -m tempering` is the command `tempering`."""

import sys

from tempering.cli import main

sys.exit(main())
