"""Entry point: `ray job submit ... -- python jobs/paper/fig2_selection_variance.py --config ...`.

The same as `python -m mrd_ray.paper fig2`.
"""

import sys

from mrd_ray.paper.main import main

if __name__ == "__main__":
    sys.exit(main(["fig2", *sys.argv[1:]]))
