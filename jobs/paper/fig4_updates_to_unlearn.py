"""Entry point: `ray job submit ... -- python jobs/paper/fig4_updates_to_unlearn.py --config ...`.

The same as `python -m mrd_ray.paper fig4`.
"""

import sys

from mrd_ray.paper.main import main

if __name__ == "__main__":
    sys.exit(main(["fig4", *sys.argv[1:]]))
