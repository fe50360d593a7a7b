"""Parts of the fallback host of timm: a traced forward pass on the meta device, roles, depths and small models."""
