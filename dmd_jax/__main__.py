"""`python -m dmd_jax`."""

import sys

from dmd_jax.cli import main

sys.exit(main())
