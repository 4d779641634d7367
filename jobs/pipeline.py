"""Entry point for `ray job submit ... -- python jobs/pipeline.py --config ...`: the same as `mrd-ray pipeline`."""

import sys

from mrd_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
