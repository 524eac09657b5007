"""`python -m moduli` is the command line."""

import sys

from moduli.cli import main

if __name__ == "__main__":
    sys.exit(main())
