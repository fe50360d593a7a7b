"""Adds the generated pages to the site while MkDocs builds it (plugin mkdocs-gen-files)."""

import sys
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).parent))

from pages import generated_pages
from source_files import source_files_page

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
PAGES = {**generated_pages(), "source-files.md": source_files_page(ROOT), "contributing.md": CONTRIBUTING}

for path, text in PAGES.items():
    with mkdocs_gen_files.open(path, "w", encoding="utf-8") as file:
        file.write(text)
