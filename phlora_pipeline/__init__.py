"""PHLoRA, post hoc: full-rank fine-tunes become LoRA adapters, one by one or a zoo at a time.

Importing the package loads neither ray, nor pyarrow, nor torch; each comes with the module that is its home.
"""

from importlib.metadata import version

__version__ = version("phlora-pipeline")
