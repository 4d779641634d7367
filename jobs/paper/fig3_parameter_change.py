"""Entry point: `ray job submit ... -- python jobs/paper/fig3_parameter_change.py --config ...`.

The same as `python -m mrd_ray.paper fig3`.
"""

import sys

from mrd_ray.paper.main import main

if __name__ == "__main__":
    sys.exit(main(["fig3", *sys.argv[1:]]))
