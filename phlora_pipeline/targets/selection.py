"""What the user wants adapted."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

from phlora_pipeline.targets.kinds import MATRIX_KINDS, Kind, module_of

Targets = Literal["all", "linear", "paper"]
EXCLUDED = "excluded by --exclude"
_TARGET_KINDS: dict[Targets, frozenset[Kind]] = {
    "all": MATRIX_KINDS,
    "linear": MATRIX_KINDS - {"embedding", "lm_head", "conv"},
    "paper": frozenset({"attention", "mlp", "expert"}),  # the paper's Appendix B
}


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user wants adapted.

    Attributes:
        targets: a named set of kinds.
        include, exclude: globs on tensor or module names. With `include`, only what matches is adapted, whatever its kind of matrix.
        conv_groups: (glob, number of groups) of convolutions, which no checkpoint says; the first that matches counts.
    """

    targets: Targets = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    conv_groups: tuple[tuple[str, int], ...] = ()

    def excludes(self, name: str) -> bool:
        """Whether `--exclude` names the tensor."""
        return any(_matches(name, pattern) for pattern in self.exclude)

    def groups_of(self, name: str) -> int | None:
        """How many groups a convolution has; None where nobody said."""
        return next((groups for glob, groups in self.conv_groups if self.says(glob, name)), None)

    @staticmethod
    def says(glob: str, name: str) -> bool:
        """Whether a glob names the tensor."""
        return _matches(name, glob)

    def refusal(self, name: str, kind: Kind) -> str:
        """Why a matrix is not adapted by the user's choice; empty where it is."""
        if self.excludes(name):
            return EXCLUDED
        if self.include:
            return "" if any(_matches(name, pattern) for pattern in self.include) else "not named by --include"
        return "" if kind in _TARGET_KINDS[self.targets] else f"--targets {self.targets} leaves out kind {kind}"


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module_of(name), pattern)
