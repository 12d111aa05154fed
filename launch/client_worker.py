"""`deepspeed launch/client_worker.py`: the resident worker of a Flower SuperNode, started by hand.

Needed only where one message after the other goes to ranks on several machines, or to have it warm before the first;
else the ClientApp starts it. `python launch/client_worker.py --stop` ends it. See examples/deployment.
"""

import sys

from sam_ds.federation.supernode.resident import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
