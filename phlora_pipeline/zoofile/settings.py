"""What may be set for a model and for a run. The extraction's fields are `RunConfig`'s, name by name; a test keeps them so."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from phlora_pipeline import config
from phlora_pipeline.config import MAX_RANK, BudgetText, Dtype, Groups, Rank, RunConfig
from phlora_pipeline.errors import quoted
from phlora_pipeline.zoofile.document import Path

PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": {"rank": 32, "solver": "exact", "targets": "paper"}}
"""What a preset stands for."""

Bytes = Annotated[
    ByteSize, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["2TB"]}]})
]


def refused(what: str, *, remedy: str = "", at: Path = ()) -> PydanticCustomError:
    """A validator's error that keeps its remedy, and the place below the value where it belongs."""
    return PydanticCustomError("refused", "{what}", {"what": what, "remedy": remedy, "at": at})


class Strict(BaseModel):
    """A mapping of known keys. A key with nothing behind it counts as left out, unless nothing is a value there."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        fields = {key: field for name, field in cls.model_fields.items() for key in (field.alias or name, name)}
        for key in data:
            if key not in fields:
                shown = [field.alias or name for name, field in cls.model_fields.items()]
                raise refused(f"unknown key {quoted(key)}{_meant(key, shown)}", remedy=_remedy(shown), at=(str(key),))
        return {key: value for key, value in data.items() if value is not None or _nullable(fields[key])}


def _meant(key: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key)[:100].lower(), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _remedy(known: Iterable[str]) -> str:
    return f"known here: {', '.join(known)}"


def _nullable(field: FieldInfo) -> bool:
    kinds = get_args(field.annotation) if get_origin(field.annotation) in {Union, types.UnionType} else ()
    return type(None) in kinds


class ExtractSettings(Strict):
    """How adapters are extracted. In the file a layer: it only names what it changes, and is written out again as that."""

    rank: Rank = Field(
        default=32,
        description="r of the adapter; auto: each tensor's singular values above its rounding noise; with `energy` or `budget`, the least that max_rank may be",
    )
    energy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="instead of a rank: each tensor gets the smallest with E_r of this or more",
    )
    budget: BudgetText | None = Field(
        default=None,
        description="instead of a rank: what the weights' file of each model may take (200MB, 64MiB) or its parameters (12M-params), spent where it keeps most energy",
    )
    max_rank: int = Field(
        default=0,
        ge=0,
        le=MAX_RANK,
        description="singular values and vectors kept while computing; 0: the same as rank, 128 where ranks are chosen",
    )
    targets: Literal["all", "linear", "paper"] = Field(
        default="all",
        description="all: every 2-D weight and embedding; linear: no embeddings or lm_head; paper: attention and MLP",
    )
    include: tuple[str, ...] = Field(default=(), description="globs of tensor names: only these")
    exclude: tuple[str, ...] = Field(default=(), description="globs of tensor names: not these")
    conv_groups: tuple[Groups, ...] = Field(default=(), description="GLOB=N: these convolutions have so many groups")
    carry: Literal["none", "all"] = Field(
        default="none", description="all: norms, biases and grown embeddings are kept whole, with `for: peft`"
    )
    dialect: Literal["portable", "peft", "vllm", "sglang", "nim", "gguf", "kohya"] = Field(
        default="portable",
        alias="for",
        description="portable: what every supported server loads; or one of them, with all that it takes",
    )
    dtype: Dtype = Field(default="auto", description="of the factors; auto: the fine-tune's, where that has 16 bits")
    solver: Literal["auto", "krylov", "gram", "exact"] = Field(
        default="auto", description="auto: the quickest that the certificate allows; exact: torch.linalg.svd"
    )
    tolerance: float = Field(
        default=1e-3, gt=0, le=1, description="of the certificate: share of ‖ΔW‖² that may be lost against the optimum"
    )
    profile: str = Field(default="", description="rates of the device, a file that `phlora calibrate` wrote")
    preset: Literal["paper"] | None = Field(
        default=None,
        description="paper: rank 32, solver exact, targets paper, except for what is named beside it; "
        "null: not the preset of an earlier layer",
    )

    @model_serializer(mode="wrap")
    def _only_what_was_named(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Otherwise a layer that is stored and read again would change everything to the defaults.
        fields = type(self).model_fields
        named = {key for name in self.model_fields_set for key in (name, fields[name].alias)}
        return {key: value for key, value in write(self).items() if key in named}

    def run_config(self, *, base: str, tuned: str, out: str, base_name: str, run: RunSettings) -> RunConfig:
        """One model's extraction. Settings of the run that one extraction has no use for stay behind.

        Raises:
            RequestError: the settings do not fit each other, or the places do not.
        """
        own = {name: value for name, value in run if name in RunConfig.model_fields}
        kept = {name: value for name, value in self if name != "preset"}
        return config.run_config(base=base, tuned=tuned, out=out, base_name=base_name, **own, **kept)


class RunSettings(Strict):
    """How a run works: nothing here changes an adapter's bytes, except that `allow_partial` and `force` let more be published."""

    engine: Literal["auto", "local", "ray"] = Field(
        default="auto", description="local: in this process; ray: a cluster"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, or cuda:N")
    workers: int = Field(default=0, ge=0, description="Ray workers; 0: as many as the devices or processors allow")
    threads: int = Field(default=0, ge=0, le=1024, description="processor threads per worker; 0: all, at most 8")
    gpus_per_worker: float = Field(
        default=1.0, gt=0, description="1 or more, whole; or a fraction, for several workers on a GPU (small models)"
    )
    share_base: Literal["auto", "max", "off"] = Field(
        default="auto",
        description="how many models of one base are converted together, so that the base is read once for them",
    )
    allow_partial: bool = Field(
        default=False, description="publish a model with failed tensors, naming them in its card"
    )
    force: bool = Field(default=False, description="publish even where the fine-tune hardly resembles its base")
    keep_parts: bool = Field(
        default=False,
        description="leave intermediate results as long as their version: another rank or dialect needs no second SVD",
    )

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_or_fraction(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise refused(f"more than one GPU for a worker must be whole GPUs, got {gpus}", remedy="write 2, not 1.5")
        return gpus


class Limits(Strict):
    """What one run may take at most, whatever the schedule is; 0 is no limit. What is left over waits for the next run."""

    max_models: int = Field(default=0, ge=0, description="models converted in one run")
    max_bytes: Bytes = Field(
        default=ByteSize(0), ge=0, description="bytes read in one run; 2TB and 500GiB are understood"
    )
    max_minutes: float = Field(
        default=0, ge=0, allow_inf_nan=False, description="after these no further model is begun"
    )
    max_models_due: int = Field(
        default=100,
        ge=0,
        description="more due than this (a base was replaced?) needs --yes",
    )


def merge(layers: Iterable[ExtractSettings]) -> ExtractSettings:
    """All settings of a model, each named: later layers win, within a layer what is named wins over its preset.

    Raises:
        RequestError: together they make no sense, such as a max_rank below the rank.
    """
    layers = list(layers)
    reset = max((i for i, layer in enumerate(layers) if _resets(layer)), default=-1)
    named: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        if layer.preset and number > reset:
            named |= PRESETS[layer.preset]
        own = {name: getattr(layer, name) for name in layer.model_fields_set - {"preset"}}
        named = {name: value for name, value in named.items() if not _gives_way(name, value, own)} | own
    made = config.run_config(base="/base", tuned="/tuned", **named)  # any places: only the settings are wanted
    full = {name: getattr(made, name) for name in ExtractSettings.model_fields if name != "preset"}
    return ExtractSettings(**full, preset=None)


def _gives_way(name: str, value: object, later: Mapping[str, Any]) -> bool:
    """A way to choose ranks that an earlier layer names, where a later one names another."""
    chosen = {way for way in ("energy", "budget") if later.get(way) is not None}
    chosen |= {"rank"} if later.get("rank") == "auto" else set()
    return bool(chosen) and (name in {"energy", "budget"} or (name == "rank" and value == "auto"))


def _resets(layer: ExtractSettings) -> bool:
    return layer.preset is None and "preset" in layer.model_fields_set
