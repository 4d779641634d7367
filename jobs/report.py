"""Entry point for `ray job submit ... -- python jobs/report.py --config ...`: the same as `mrd-ray report`."""

import sys

from mrd_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
