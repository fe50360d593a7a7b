"""Comparisons of methods with the code of their authors and with other libraries, from clones of their repositories.

`python -m tests.parity.table --sources FOLDER` runs them and writes `src/veneer/parity.json` and `docs/results/parity.md`.
`VENEER_PARITY_SOURCES=FOLDER pytest tests/parity` runs them as tests.
"""
