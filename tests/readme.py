"""README.md is `nbs/index.ipynb` as Markdown, without its hidden cells. `--check` compares instead of writing."""
from __future__ import annotations

import sys
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parents[1]


def readme() -> str:
    hidden = Config({"RegexRemovePreprocessor": {"enabled": True, "patterns": [r"^#\|\s*(hide|default_exp)"]}})
    text, _ = MarkdownExporter(config=hidden).from_filename(str(ROOT / "nbs" / "index.ipynb"))
    return "<!-- made from nbs/index.ipynb by `make readme` -->\n\n" + text.strip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv: sys.exit(readme() != (ROOT / "README.md").read_text() and "README.md differs from nbs/index.ipynb: run make readme")
    (ROOT / "README.md").write_text(readme())
