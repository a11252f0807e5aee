"""`python -m fedsim`, which is also what torchrun starts."""

import os
import sys

from fedsim.cli import main
from fedsim.launch import size

try:
    main()
except SystemExit as end:
    if size() > 1:
        # Threads inside gloo, which may wait for others still, would turn the status into an
        # abort's: 2 of 16 runs of one test that had gone well ended so.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else end.code is not None)
    raise
