"""``python -m sinkattn``: the command line."""

import sys

from sinkattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
