"""The package's own tests: its host, its method on it and on one of veneer's hosts, and veneer's methods on its host."""

from veneer_example.gain import Gain

from veneer.testing import parametrize_with_checks

SUBJECTS = ["resmlp", (Gain(), "resmlp"), ("gain", "timm_vit"), ("lora", "resmlp"), ("bitfit", "resmlp")]


@parametrize_with_checks(SUBJECTS, once=["compiles_to_one_graph"])
def test_conformance(check):
    check()
