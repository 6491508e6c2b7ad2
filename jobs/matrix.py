"""Write the README's table of layer kinds and dialects anew: python -m jobs.matrix."""

from __future__ import annotations

from pathlib import Path

from phlora_pipeline import matrix

README = Path(__file__).parent.parent / "README.md"

if __name__ == "__main__":
    README.write_text(matrix.insert(README.read_text("utf-8")), "utf-8")
