"""Search for a prompt of ordinary words that describes photos, by the similarity of a CLIP."""

from .search import PromptMatch, SearchOptions, search_prompt

__all__ = ["PromptMatch", "SearchOptions", "search_prompt"]
