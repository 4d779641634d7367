"""Entry point: `ray job submit ... -- python jobs/paper/table7_characteristics.py --config ...`.

The same as `python -m mrd_ray.paper table7`.
"""

import sys

from mrd_ray.paper.main import main

if __name__ == "__main__":
    sys.exit(main(["table7", *sys.argv[1:]]))
