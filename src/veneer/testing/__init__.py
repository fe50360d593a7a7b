"""The conformance suite, which packages run in their own tests for methods and hosts, and tiny pipelines.

check_method("my_method", "timm_vit").failures     # () if it conforms
check_host("my_host").failures

@parametrize_with_checks([MyMethod(), MyHost])     # one test per check, for pytest
def test_conformance(check):
    check()
"""

from .pipelines import tiny_pipeline
from .records import Check, Record, Records
from .suite import check_host, check_method, parametrize_with_checks

__all__ = ["Check", "Record", "Records", "check_host", "check_method", "parametrize_with_checks", "tiny_pipeline"]
