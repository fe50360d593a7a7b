"""Control by maps: what is computed from a picture or drawn by hand, paired with photos, and measured on generated pictures."""

from veneer.extras import require

require("scipy")
