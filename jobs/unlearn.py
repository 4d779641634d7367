"""Entry point for `ray job submit ... -- python jobs/unlearn.py --config ...`: the same as `mrd-ray unlearn`."""

import sys

from mrd_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["unlearn", *sys.argv[1:]]))
