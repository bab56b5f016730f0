"""``python -m hfprune COMMAND`` is ``hfprune COMMAND``."""

import sys

from hfprune.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
