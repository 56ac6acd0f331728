"""A process of a run that does nothing but wait for the others, for a minute."""

import argparse
import time

from dmd_jax.arguments import add_process_arguments
from dmd_jax.parallel import processes

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_process_arguments(parser)
    processes.join_processes(parser.parse_args(), lambda: (None, {}))
    print("joined", flush=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        processes.wait_for_all()
        time.sleep(0.1)
