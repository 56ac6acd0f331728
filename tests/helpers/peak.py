"""What a piece of Python costs in a process of its own, less the imports: peak memory and time.

The time is the CPU's, since other tests share the machine; that a program hangs ends it after 60 s.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import json, resource, sys, time

exec(sys.argv[1])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
message = None
try:
    exec(sys.argv[2])
except UserError as error:
    message = str(error)
cost = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - start]
print(json.dumps([message, *cost]))
"""


class Cost(NamedTuple):
    """message: of the UserError, if there was one. megabytes, seconds: beyond the imports."""

    message: str | None
    megabytes: float
    seconds: float


def cost_of(imports: str, code: str) -> Cost:
    """Runs `code` after `imports`; any exception but a UserError fails the caller."""
    imports = f"from dmd_jax.errors import UserError\n{imports}"
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, imports, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    message, kilobytes, seconds = json.loads(done.stdout.splitlines()[-1])
    return Cost(message, kilobytes / 1024, seconds)
