"""Entry point for `ray job submit ... -- python jobs/evaluate.py --config ...`: the same as `mrd-ray evaluate`."""

import sys

from mrd_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
