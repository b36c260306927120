"""`dist-cts train` from a checkout; see --help."""

import sys

from dist_cts.commands import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
