"""Control adapters: control maps from images or sketches, training on pairs, and evaluation of generated images."""

from veneer.extras import require

require("scipy")
