"""`python -m pykv` is the command `pykv`."""

import sys

from pykv.cli import main

sys.exit(main())
