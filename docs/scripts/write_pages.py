"""Adds the generated pages to the site while MkDocs builds it (plugin mkdocs-gen-files)."""

import sys
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).parent))

from pages import generated_pages

for path, text in generated_pages().items():
    with mkdocs_gen_files.open(path, "w", encoding="utf-8") as file:
        file.write(text)
