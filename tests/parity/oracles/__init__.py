"""One module for each oracle: `ORACLE`, `METHODS` and `rows()`, the measured rows of the table."""
