"""`python -m vblora_triton`: the command `vblora-triton`."""

import sys

from vblora_triton.cli import main

sys.exit(main())
