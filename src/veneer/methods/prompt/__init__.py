"""Methods that train input tokens, prompts or pixels."""
