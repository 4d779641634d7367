"""`python -m mrd_ray` is `mrd-ray`."""

import sys

from mrd_ray.cli import main

sys.exit(main())
