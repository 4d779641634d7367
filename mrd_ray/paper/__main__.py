"""`python -m mrd_ray.paper` is the command line of the experiments."""

import sys

from mrd_ray.paper.main import main

if __name__ == "__main__":
    sys.exit(main())
