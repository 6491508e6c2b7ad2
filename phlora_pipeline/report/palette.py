"""Colours by their role, each for a light and for a dark page. Pure.

Figures are drawn with the light ones, and no two roles share one: in an SVG each is then replaced by a CSS variable of its
role, so that the same drawing follows the reader's colour scheme.
"""

from __future__ import annotations

import re

STEPS = 10
"""Of the scale that heat maps use."""


def _ramp(anchors: tuple[str, ...]) -> list[str]:
    """`STEPS` colours between anchors, evenly."""
    points = [tuple(int(anchor[at : at + 2], 16) for at in (1, 3, 5)) for anchor in anchors]
    found = []
    for step in range(STEPS):
        place = step / (STEPS - 1) * (len(points) - 1)
        first = min(int(place), len(points) - 2)
        mixed = (round(a + (b - a) * (place - first)) for a, b in zip(points[first], points[first + 1], strict=True))
        found.append("#" + "".join(f"{value:02x}" for value in mixed))
    return found


_LIGHT_RAMP = _ramp(("#e8f1fa", "#9cc6e8", "#3f8fce", "#17578f", "#0a2a4d"))
_DARK_RAMP = _ramp(("#1b2b3d", "#1f4f7d", "#2f7fc1", "#76b5ea", "#dcedfc"))

ROLES: dict[str, tuple[str, str]] = {
    "surface": ("#fefefe", "#141a24"),
    "ink": ("#1a2230", "#e7ecf4"),
    "soft": ("#5a6678", "#9ba8bb"),
    "rule": ("#e1e6ee", "#2b3546"),
    "blank": ("#eceef1", "#222a37"),
    "on-low": ("#1b2331", "#e8edf5"),
    "on-high": ("#fdfdff", "#0b1018"),
    "s0": ("#1f6feb", "#6ea8ff"),
    "s1": ("#c2570c", "#fb9a4b"),
    "s2": ("#0f8a5f", "#3ecf9a"),
    "s3": ("#8b3fd1", "#c08bff"),
    "s4": ("#c02655", "#ff7d9f"),
    "s5": ("#0b7f95", "#46c8dd"),
    "s6": ("#8a6d00", "#e0c04a"),
    "s7": ("#566077", "#a9b4c8"),
    **{f"h{step}": (light, dark) for step, (light, dark) in enumerate(zip(_LIGHT_RAMP, _DARK_RAMP, strict=True))},
}
SERIES = tuple(f"s{number}" for number in range(8))
LIGHT = {role: light for role, (light, _) in ROLES.items()}
_ROLE_OF = {light: role for role, light in LIGHT.items()}
_HEX = re.compile(r"#[0-9a-f]{6}\b")


def with_variables(svg: str) -> str:
    """An SVG in which every colour of a role is that role's CSS variable.

    >>> with_variables('<path style="fill: #1a2230"/>')
    '<path style="fill: var(--ink)"/>'
    """
    return _HEX.sub(lambda found: f"var(--{_ROLE_OF[found[0]]})" if found[0] in _ROLE_OF else found[0], svg)


def stylesheet() -> str:
    """The variables, for either scheme."""
    light, dark = (";".join(f"--{role}:{pair[side]}" for role, pair in ROLES.items()) for side in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
