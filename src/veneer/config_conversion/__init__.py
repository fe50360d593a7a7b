"""Configs of other trainers as configs of `veneer personalize`: kohya's sd-scripts and ai-toolkit."""

from .conversion import ConfigConversion, convert_file
from .source_table import Remark

__all__ = ["ConfigConversion", "Remark", "convert_file"]
