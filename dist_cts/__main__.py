"""`python -m dist_cts COMMAND ...`, and `torchrun -m dist_cts COMMAND ...` on several ranks."""

from dist_cts.commands import main

if __name__ == "__main__":
    main()
