"""What the commands' flags are: their names, their help, the values that they take."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

RANKS, SELECT, NUMERICS, RUN, NIGHT = (
    "How many ranks: one of --rank, --energy, --budget",
    "What is adapted",
    "How it is computed",
    "How it runs",
    "Where a night would run (with ZOO)",
)


class Targets(StrEnum):
    """Named sets of kinds."""

    ALL = "all"
    LINEAR = "linear"
    PAPER = "paper"


class Dialect(StrEnum):
    """For whom the adapter is written."""

    PORTABLE = "portable"
    PEFT = "peft"
    VLLM = "vllm"
    SGLANG = "sglang"
    NIM = "nim"
    GGUF = "gguf"
    KOHYA = "kohya"


class Carry(StrEnum):
    """What is kept whole."""

    NONE = "none"
    ALL = "all"


class Dtype(StrEnum):
    """Of the factors."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Engine(StrEnum):
    """Where tasks run."""

    AUTO = "auto"
    LOCAL = "local"
    RAY = "ray"


class Solver(StrEnum):
    """How the factors are computed."""

    AUTO = "auto"
    KRYLOV = "krylov"
    GRAM = "gram"
    EXACT = "exact"


_BASE = typer.Option(
    "--base",
    metavar="URL",
    show_default=False,
    help="The base checkpoint: a folder with config.json and safetensors, or one .safetensors file.",
)
_TUNED = typer.Option("--tuned", metavar="URL", show_default=False, help="The fine-tuned checkpoint of that base.")
Base = Annotated[str, _BASE]
Tuned = Annotated[str, _TUNED]
Out = Annotated[
    str, typer.Option("--out", metavar="URL", help="Where the adapter goes: a folder that is empty or absent.")
]
Rank = Annotated[
    str | None,
    typer.Option(
        "--rank",
        "-r",
        metavar="N|N,M,…|auto",
        rich_help_panel=RANKS,
        show_default="32",
        help="Rank r of the adapter, 1 to 512. 16,32,64: a folder for each (OUT/r16 …) from one extraction. auto: each tensor's singular values above its rounding noise.",
    ),
]
MaxRank = Annotated[
    int,
    typer.Option(
        "--max-rank",
        rich_help_panel=RANKS,
        help="Singular values kept for the manifest; E_r is known up to here, and no rank is chosen above. 0: the largest --rank, or 128.",
    ),
]
TargetsOption = Annotated[
    Targets,
    typer.Option(
        "--targets",
        rich_help_panel=SELECT,
        help="all: every 2-D weight and embedding; linear: no embeddings or lm_head; paper: attention and MLP.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        rich_help_panel=SELECT,
        help="Adapt only matrices whose name matches; may be repeated.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        rich_help_panel=SELECT,
        help="Leave out tensors whose name matches; may be repeated.",
    ),
]
ConvGroups = Annotated[
    list[str] | None,
    typer.Option(
        "--conv-groups",
        metavar="GLOB=N",
        rich_help_panel=SELECT,
        help="These convolutions have N groups, which no checkpoint says; may be repeated. Example: 'pos_conv*=16'.",
    ),
]
CarryOption = Annotated[
    Carry,
    typer.Option(
        "--carry",
        rich_help_panel=SELECT,
        help="all: norms, biases and grown embeddings are kept whole, for what LoRA has no form for; only with --for peft.",
    ),
]
For = Annotated[
    Dialect,
    typer.Option(
        "--for",
        rich_help_panel=SELECT,
        help="portable: what PEFT, vLLM, SGLang, NIM and llama.cpp all apply; or one of them, with all that it takes (gguf: llama.cpp; kohya: diffusion UIs).",
    ),
]
BaseName = Annotated[
    str,
    typer.Option(
        "--base-name",
        metavar="NAME",
        rich_help_panel=SELECT,
        help="The base's hub id or served name, for adapter_config.json. Default: what config.json says.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        rich_help_panel=NUMERICS,
        help="Of the written factors; auto: the fine-tune's where that has 16 bits, else float32.",
    ),
]
SolverOption = Annotated[
    Solver,
    typer.Option(
        "--solver",
        rich_help_panel=NUMERICS,
        help="auto: the cheapest that meets --tolerance; krylov: block Krylov; gram: eigenvectors of ΔWΔWᵀ; exact: full SVD.",
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance",
        rich_help_panel=NUMERICS,
        help="Share of ‖ΔW‖² that the factors may certifiably lose against the optimal ones of their rank.",
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="SHARE",
        rich_help_panel=RANKS,
        help="Instead of --rank: each tensor's smallest rank that keeps this share of its ‖ΔW‖², at most --max-rank.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        rich_help_panel=RANKS,
        show_default=False,
        help="Instead of --rank: the most energy that fits. 200MB, 64MiB: the weights' file as written; 12M-params: its numbers. --for peft and vllm give each tensor its own rank.",
    ),
]
ProfileOption = Annotated[
    str,
    typer.Option(
        "--profile", metavar="FILE", rich_help_panel=NUMERICS, help="Rates of your device, from phlora calibrate."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and no progress.")]

Zoo = Annotated[str, typer.Argument(metavar="ZOO", help="The zoo.yaml: a path or URL. phlora init writes a first one.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model's id, as phlora status shows it.")]
Yes = Annotated[
    bool, typer.Option("--yes", help="Convert even if more models are due than limits.max_models_due allows.")
]
Nodes = Annotated[int, typer.Option("--nodes", min=1, rich_help_panel=NIGHT, help="Nodes of the cluster.")]
GpusPerNode = Annotated[int, typer.Option("--gpus-per-node", min=1, rich_help_panel=NIGHT, help="GPUs of each.")]
NodeReadRate = Annotated[
    float,
    typer.Option(
        "--node-read-rate", metavar="GB/S", min=0.001, rich_help_panel=NIGHT, help="What one node reads from storage."
    ),
]
Price = Annotated[
    float,
    typer.Option(
        "--price", min=0, rich_help_panel=NIGHT, help="Of a node and hour, in your currency; 0: no cost is told."
    ),
]
Gpu = Annotated[
    str,
    typer.Option(
        "--gpu", metavar="KIND", rich_help_panel=NIGHT, help="Whose rates: sm80 (A100), sm90 (H100), cpu or other."
    ),
]
GpuMemory = Annotated[
    float,
    typer.Option(
        "--gpu-memory", metavar="GB", min=0, rich_help_panel=NIGHT,
        help="Of one GPU: 40 for p4d, 80 for p4de. 0: what its kind has at least (sm80 40, sm90 80).",
    ),
]  # fmt: skip
