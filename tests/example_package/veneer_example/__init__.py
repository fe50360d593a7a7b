"""An example package: the method `gain`, the host `resmlp` and the diffusion transformer `clay`."""
