"""`dist-cts prepare` from a checkout; see --help."""

import sys

from dist_cts.commands import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
