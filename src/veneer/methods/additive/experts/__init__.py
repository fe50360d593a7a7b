"""Several adapters at one site: experts that are sampled and averaged, frozen adapters that are fused."""
