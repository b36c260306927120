"""`dist-cts meta-test` from a checkout; see --help."""

import sys

from dist_cts.commands import main

if __name__ == "__main__":
    main(["meta-test", *sys.argv[1:]])
