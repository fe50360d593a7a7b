"""Study of attention heads: patterns of their maps, and what a model loses without a head.

layers = attention_layers(model)                       # every attention whose output projection is a site
with disabled_heads(model, {layers[0].name: (3,)}):    # head 3 of the first layer attends to all tokens alike
    logits = model(pixels)
"""

from veneer.injection.seams.attention_call import AttentionCall

from .attention_calls import visit_attention
from .disabled_heads import disabled_heads
from .layers import AttentionLayer, HeadsError, attention_layers
from .patterns import PATTERNS, HeadPattern, pattern_of

__all__ = [
    "PATTERNS", "AttentionCall", "AttentionLayer", "HeadPattern", "HeadsError", "attention_layers", "disabled_heads",
    "pattern_of", "visit_attention",
]  # fmt: skip
