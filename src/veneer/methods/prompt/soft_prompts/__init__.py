"""Soft prompts of language models at vision models: trained keys and values, tokens and words."""
