"""An example package: the method `gain` and the host `resmlp`."""
