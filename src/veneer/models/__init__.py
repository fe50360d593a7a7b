"""Model classes that veneer itself defines on top of other libraries. Hosts describe them as they describe any other model."""
