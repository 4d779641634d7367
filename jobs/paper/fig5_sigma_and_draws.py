"""Entry point: `ray job submit ... -- python jobs/paper/fig5_sigma_and_draws.py --config ...`.

The same as `python -m mrd_ray.paper fig5`.
"""

import sys

from mrd_ray.paper.main import main

if __name__ == "__main__":
    sys.exit(main(["fig5", *sys.argv[1:]]))
