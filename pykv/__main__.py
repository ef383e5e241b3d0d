"""`python -m pykv` is the command `pykv`."""

import sys

from pykv.cli import main

if __name__ == "__main__":  # processes of multiprocessing import it, too
    sys.exit(main())
