"""Check a run and convert its base model, before any node is asked: what every node needs a copy of.

    python examples/deployment/prepare.py RUN.toml --set out=runs/site

prints the folder. The server's own start does the same, and finds it done.
"""

from __future__ import annotations

import argparse
import sys

from sam_ds.config import load_config
from sam_ds.errors import InputError
from sam_ds.federation.methods.registry import configured
from sam_ds.federation.run import prepare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the TOML file that `flwr run --run-config` gets")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    options = parser.parse_args()
    try:
        print(prepare(configured(load_config(options.config, options.set))))
    except InputError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
