"""`deepspeed launch/run_federation.py`: a whole federation on the ranks of one launch.

With no argument it needs no network, no accelerator and no data of yours. See README for real models and text.
"""

import sys

from sam_ds.federation.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
