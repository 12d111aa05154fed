"""`python -m sam_ds`: the same as the `sam-ds` command."""

import sys

from sam_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
