"""Run the command line as `python -m graphclone`."""

import sys

from graphclone.cli import main

if __name__ == "__main__":
    sys.exit(main())
