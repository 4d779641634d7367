"""`python -m jobs.paper` is the command line of the experiments."""

import sys

from jobs.paper.main import main

if __name__ == "__main__":
    sys.exit(main())
