"""The installed `veneer` command: what OpenMP reads once, when torch is loaded, is said before anything of veneer is imported.

A thread of a parallel region that has done its share waits for the others, by default by asking again and again. Where other
processes want the cores, the one that is waited for does not get one: beside them a step of training on two cores took 8 to 13
seconds. With a short wait before they sleep it took 0.5 beside two busy processes, and 0.17 in place of 0.14 alone; with none,
0.29 alone. `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY` of the environment have their way. Jobs of `veneer app` inherit it.
"""

import os
import sys
from importlib.metadata import version

SPINS = "1000"
"""Times that a thread asks before it sleeps."""


def console() -> None:
    """Run the command that this process was given."""
    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") == "app" and not {"-h", "--help"} & {*sys.argv}:
        print(f"veneer {version('veneer')} is starting. Its address follows in some seconds.", flush=True)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from veneer.cli import console as run

    run()
