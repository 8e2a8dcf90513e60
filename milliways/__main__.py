"""`python -m milliways` is the `milliways` command."""

import sys

from milliways.cluster.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
