"""Settings of the documentation site: `make docs` builds it, and warnings are errors."""

import logging
import os
import re
from pathlib import Path

import sinkattn

# transformers imports torchao, whose remarks on libraries that it does not find concern no page.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

project = "sinkattn"
version = release = sinkattn.__version__
html_title = f"sinkattn {version}"
html_theme = "furo"
html_show_copyright = False
html_static_path = html_css_files = ["site.css"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["evaluation/real-quick"]  # which `make real` writes
myst_heading_anchors = 4

# In docstrings `x` names something, with a link to it if it has a place here, and ``x`` is code.
default_role = "py:obj"
add_module_names = False
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# Files of the repository that are pages of the site, too.
DOCS = Path(__file__).parent
ROOT = DOCS.parent
FILES = {
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "examples": ROOT / "examples" / "README.md",
    "demo-model": ROOT / "sinkattn" / "demo_model" / "README.md",
}


def read_page(app, name, source):
    """Put such a file into its page, and make links between files links between pages."""
    file = FILES.get(name, DOCS / f"{name}.md")
    if name in FILES:
        source[0] = file.read_text(encoding="utf-8")
        app.env.note_dependency(file)
    pages = {other: DOCS / f"{page}.md" for page, other in FILES.items()}

    def link(match):
        target = (file.parent / match[1]).resolve()
        return "](" + os.path.relpath(pages.get(target, target), (DOCS / name).parent)

    source[0] = re.sub(r"\]\((?![a-z]+:)([^)#\s]+)", link, source[0])


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", read_page)
