"""The web app: a Gradio interface over the commands of the package."""

from veneer.extras import require

require("gradio", "diffusers")
