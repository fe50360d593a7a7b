"""The app: a page in the browser over the commands, with no logic of its own."""

from veneer.extras import require

require("gradio")
