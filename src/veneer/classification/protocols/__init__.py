"""Protocols of published benchmarks: VTAB-1k, FGVC and CoOp's few-shot classification."""
