"""The installed `veneer` command. It sets OpenMP's environment variables, which are read when torch is imported.

By default a thread that has finished its share of a parallel region waits for the others by spinning. If other processes use the
cores, spinning takes time from the threads that still work: a training step on two cores took 8 to 13 seconds beside two busy
processes. With short spinning it took 0.5 seconds beside them and 0.17 alone, compared with 0.14 for long spinning; with none,
0.29 alone. `GOMP_SPINCOUNT` and `OMP_WAIT_POLICY` in the environment take precedence. Jobs of `veneer app` inherit the setting.
"""

import os
import sys
from importlib.metadata import version

SPINS = "1000"
"""Number of spins before a thread sleeps."""


def console() -> None:
    """Runs the command in `sys.argv`."""
    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "app" and not {"-h", "--help"} & {*sys.argv}:
        print(f"veneer {version('veneer')} is starting. Its address follows in some seconds.", flush=True)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from veneer.cli import console as run

    run()
