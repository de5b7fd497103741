"""``python -m sklformat``: the command line without its console script."""

import sys

from sklformat.cli import main

if __name__ == "__main__":
    sys.exit(main())
