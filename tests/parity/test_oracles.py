"""Every oracle, run again: the differences are those of rounding."""

from __future__ import annotations

import pytest

from tests.parity.oracle import OracleMissing
from tests.parity.page import load_rows
from tests.parity.table import run_script, scripts

ROUNDING = {"float64": 1e-9, "float32": 1e-5}
FLOAT32_CONSTANTS = 1e-6
"""Of float64 rows whose deviation or compared code has constants in float32."""


@pytest.mark.parametrize("name", list(scripts()))
def test_an_oracle(name: str) -> None:
    try:
        rows = run_script(name)
    except OracleMissing as missing:
        pytest.skip(str(missing))
    record = {(row["method"], row["compared"]): row["difference"] for row in load_rows()}
    for row in rows:
        before = record[row["method"], row["compared"]]
        assert row["difference"] <= max(ROUNDING[row["dtype"]], 4 * before)
        assert before <= (FLOAT32_CONSTANTS if row["dtype"] == "float64" else ROUNDING["float32"])
