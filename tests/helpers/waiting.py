"""A process of a run whose steps are to wait for the others, for a minute at most.

With --hang process 0 does not come to its sixth step.
"""

import argparse
import sys
import time

from dmd_jax.commands.arguments import add_process_arguments
from dmd_jax.parallel import processes
from dmd_jax.parallel.stopping import stop_requests

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_process_arguments(parser)
    parser.add_argument("--hang", action="store_true")
    args = parser.parse_args()
    processes.join_processes(args, lambda: (None, {}))
    step, deadline = 100, time.monotonic() + 60
    with stop_requests(step) as requested:
        while time.monotonic() < deadline:
            if args.hang and args.process == 0 and step == 105:
                time.sleep(60)
            processes.wait_for_all()
            time.sleep(0.02)
            step += 1
            if step == 101:
                print("joined", flush=True)
            if number := requested(step):
                print(f"stopped at {step} by {number}", flush=True)
                processes.leave()
                sys.exit(number)
