"""ΔW → singular values, preserved energy, LoRA factors, certified. Tensors in, tensors out: no storage, no logging, no policy.

Dimensions: `b` tensors of one shape in a batch, `d` rows (outputs) and `k` columns (inputs) of a weight, `r` the rank;
`m ≤ n` for the shorter and the longer of d and k. Names are the paper's: `ΔW = W_tuned − W_base` (eq. 1), `ΔW ≈ B·A` (eq. 2),
`B = U√Σ` and `A = √ΣVᵀ` (eq. 4; its Appendix D swaps the two), `E_r = Σ_{i≤r} σ_i² / Σ_i σ_i²` (eq. 5).

From below: `delta` forms ΔW, `noise` says what of it is rounding; `operator` gives products with it; `panels`, `krylov` and `ritz` find a subspace and its
triplets, `full` decomposes all of it, `small` solves the eigenproblems in between; `certificate` and `checks` say how good that is; `routes` which way is taken, `solve`
what is done where it does not do, `decompose` in the memory that there is, `faults` what a library's error means. `compress` is for an update that is factors already.
"""

from phlora_pipeline.lowrank.compress import Compact, compact
from phlora_pipeline.lowrank.decompose import (
    BESIDE_ENTRIES,
    Outcome,
    Pair,
    Workspace,
    decompose,
    measure,
)
from phlora_pipeline.lowrank.delta import CHUNK, first_nonfinite, form_delta, sum_of_squares, to_host, unravelled
from phlora_pipeline.lowrank.energy import preserved_energy, rounding_error_sq
from phlora_pipeline.lowrank.faults import out_of_memory
from phlora_pipeline.lowrank.full import drivers
from phlora_pipeline.lowrank.noise import Noise, below_precision, rounding_noise
from phlora_pipeline.lowrank.routes import PROFILES, SOLVERS, Profile, Solver, exact_flops
from phlora_pipeline.lowrank.solve import Factors, Settings

__all__ = [
    "BESIDE_ENTRIES",
    "CHUNK",
    "PROFILES",
    "SOLVERS",
    "Compact",
    "Factors",
    "Noise",
    "Outcome",
    "Pair",
    "Profile",
    "Settings",
    "Solver",
    "Workspace",
    "below_precision",
    "compact",
    "decompose",
    "drivers",
    "exact_flops",
    "first_nonfinite",
    "form_delta",
    "measure",
    "out_of_memory",
    "preserved_energy",
    "rounding_error_sq",
    "rounding_noise",
    "sum_of_squares",
    "to_host",
    "unravelled",
]
