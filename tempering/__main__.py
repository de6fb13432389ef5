"""`python -m tempering` is the command `tempering`."""

import sys

from tempering.cli.main import main

sys.exit(main())
