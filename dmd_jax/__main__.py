"""`python -m dmd_jax`."""

import sys

from dmd_jax.commands.cli import main

sys.exit(main())
