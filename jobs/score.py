"""Entry point for `ray job submit ... -- python jobs/score.py --config ...`: the same as `mrd-ray score`."""

import sys

from mrd_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
