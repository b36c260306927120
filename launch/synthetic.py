"""`dist-cts synthetic` from a checkout; see --help."""

import sys

from dist_cts.commands import main

if __name__ == "__main__":
    main(["synthetic", *sys.argv[1:]])
