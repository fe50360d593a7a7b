"""The package's own tests: its method on its host, its method on one of veneer's hosts, and one of veneer's methods on its host."""

from veneer_example.gain import Gain

from veneer.testing import parametrize_with_checks


@parametrize_with_checks(
    ["resmlp", ("gain", "resmlp"), (Gain(start=0.0), "clip_text"), ("lora", "resmlp"), ("bitfit", "resmlp")],
    once=["compiles_to_one_graph"],
)
def test_conformance(check):
    check()
