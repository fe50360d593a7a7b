"""The installed `veneer` command: what OpenMP reads once, when torch is loaded, is said before anything of veneer is imported.

A thread of a parallel region that has done its share waits for the others, by default by asking again and again. Where another
process wants the core, the one that is waited for does not get it: on two cores a step of training took 40 times as long beside
one busy process (8.2 s and 0.2 s), and as long as ever alone. So threads sleep while they wait, unless `OMP_WAIT_POLICY` says
otherwise. The jobs of `veneer app`, beside which it draws, are started with the same words.
"""

import os


def console() -> None:
    """Run the command that this process was given."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from veneer.cli import console as run

    run()
