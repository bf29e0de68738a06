"""`python -m fused_preact`."""

import sys

from .cli import main

sys.exit(main())
