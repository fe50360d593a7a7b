"""Protocols of published benchmarks, VTAB-1k, FGVC and CoOp's few-shot classification, and few-shot curves on any dataset."""
