"""What manifests tell, for people who decide by it: a page with figures, Markdown, or JSON.

`facts` works out what there is to tell, as plain data and without a plotting library; `plots` and `maps` draw it, `html`
makes a page of it, `text` the rest; `making` puts it all where it is wanted. The only home of matplotlib and jinja2, which
come with the extra `report` and are imported when a page is made, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence

from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.report import curve, sources
from phlora_pipeline.report.curve import EnergyCurve
from phlora_pipeline.report.making import FORMATS, Format, Made, report

__all__ = ["FORMATS", "EnergyCurve", "Format", "Made", "energy_curve", "report"]


def energy_curve(source: str | Sequence[EnergyRow], ranks: Sequence[int] = ()) -> EnergyCurve:
    """Preserved energy against rank over the layers of one model: the paper's Figure 1, as numbers.

    Args:
        source: a manifest's rows, its URL, or that of an adapter's folder.
        ranks: where it is wanted; by default 1 to 512 on a logarithmic scale. Ranks at which E_r is not known for every
            adapted tensor are left out: nothing is extrapolated.

    Raises:
        NotFoundError: there is no manifest at the URL.
        CheckpointError: it is damaged, or of another schema.

    >>> from phlora_pipeline.manifest import EnergyRow
    >>> rows = [EnergyRow("", "a", "a", "mlp", (4, 2), "F32", "F32", "adapted", delta_norm=5.0, singular_values=(4.0, 3.0))]
    >>> energy_curve(rows).mean
    (0.64, 1.0)
    """
    rows = sources.rows_of(source) if isinstance(source, str) else source
    return curve.energy_curve(rows, ranks)
