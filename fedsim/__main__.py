"""`python -m fedsim`, which is also what torchrun starts."""

import os
import sys

from fedsim.cli import main
from fedsim.launch import size

try:
    main()
except SystemExit as end:
    if end.code and size() > 1:
        # Threads that still wait for others inside gloo would turn the status into an abort's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    raise
