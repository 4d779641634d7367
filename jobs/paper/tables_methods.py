"""Entry point: `ray job submit ... -- python jobs/paper/tables_methods.py --config ...`.

The same as `python -m mrd_ray.paper tables`.
"""

import sys

from mrd_ray.paper.main import main

if __name__ == "__main__":
    sys.exit(main(["tables", *sys.argv[1:]]))
