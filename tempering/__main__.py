"""Run the ``tempering`` command with ``python -m tempering``."""

import sys

from tempering.cli.main import main

sys.exit(main())
