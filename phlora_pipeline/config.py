"""What a user may set, validated once, at the edge; inside the package plain frozen values flow. The only home of pydantic."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from phlora_pipeline import storage
from phlora_pipeline.errors import RequestError, quoted
from phlora_pipeline.ranks import Budget, Policy
from phlora_pipeline.storage import normalize

if TYPE_CHECKING:
    from phlora_pipeline.lowrank import Profile

MAX_RANK = 512
POLICY_MAX_RANK = 128
"""The most that a policy may take, unless the user says otherwise."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _rank(value: Any) -> Any:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if number == "auto" or (type(number) is int and 1 <= number <= MAX_RANK):
        return number
    also = "" if type(number) is int else ", or auto"
    raise ValueError(f"rank must be between 1 and {MAX_RANK}{also}, got {quoted(value)}")


def _budget(text: str) -> str:
    Budget.parse(text)
    return text


Rank = Annotated[Annotated[int, Field(ge=1, le=MAX_RANK)] | Literal["auto"], BeforeValidator(_rank)]
BudgetText = Annotated[str, AfterValidator(_budget)]
Groups = Annotated[str, Field(pattern=r"^.+=[1-9][0-9]{0,5}$")]
"""GLOB=N: the convolutions that the glob names have N groups."""


class RunConfig(BaseModel):
    """One extraction: two checkpoints, a place for the result, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(description="the base checkpoint: a folder or one .safetensors file; a path or URL")
    tuned: str = Field(description="the fine-tuned checkpoint")
    out: str = Field(
        default="", description="where the adapter goes: an empty or absent folder; only a plan needs none"
    )
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
        description="instead of a rank: what the weights' file may take (200MB, 64MiB) or its parameters (12M-params), spent where it keeps most energy",
    )
    max_rank: int = Field(
        default=0,
        description="singular values and vectors kept while computing; 0: the same as rank, 128 where ranks are chosen",
    )
    targets: Literal["all", "linear", "paper"] = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    conv_groups: tuple[Groups, ...] = Field(default=(), description="GLOB=N: these convolutions have so many groups")
    carry: Literal["none", "all"] = Field(
        default="none",
        description="all: norms, biases and grown embeddings are kept whole, where PEFT has a place for them",
    )
    dialect: Literal["portable", "peft", "vllm", "sglang", "nim", "gguf", "kohya"] = "portable"
    dtype: Dtype = "auto"
    solver: Literal["auto", "krylov", "gram", "exact"] = "auto"
    tolerance: float = Field(
        default=1e-3, gt=0, le=1, description="of the certificate: share of ‖ΔW‖² that may be lost against the optimum"
    )
    profile: str = Field(default="", description="rates of the device, a file that `phlora calibrate` wrote")
    base_name: str = Field(
        default="", description="name of the base for servers: a hub id or a served name, never a path"
    )
    engine: Literal["auto", "local", "ray"] = "auto"
    device: str = Field(default="auto", description="auto, cpu, cuda, or cuda:N")
    workers: int = Field(default=0, ge=0, description="Ray workers; 0: as many as the devices or processors allow")
    threads: int = Field(
        default=0, ge=0, le=1024, description="processor threads per worker, for both engines; 0: all, at most 8"
    )
    allow_partial: bool = False
    overwrite: bool = False
    force: bool = False
    keep_parts: bool = False

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """`conv_groups` as globs and numbers."""
        told = (text.rpartition("=") for text in self.conv_groups)
        return tuple((glob, int(number)) for glob, _, number in told)

    @field_validator("base", "tuned")
    @classmethod
    def _absolute(cls, url: str) -> str:
        return normalize(url)

    @field_validator("out")
    @classmethod
    def _absolute_or_none(cls, url: str) -> str:
        return normalize(url) if url else ""

    @field_validator("base_name")
    @classmethod
    def _not_a_path(cls, name: str) -> str:
        if name.startswith(("/", ".", "~")) or "://" in name:
            raise ValueError(f"the base's name must be a hub id or a served name, not a path: {name!r}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        ways = [
            ("energy", self.energy is not None),
            ("budget", self.budget is not None),
            ("rank auto", self.rank == "auto"),
        ]
        if len(named := [name for name, is_set in ways if is_set]) > 1:
            raise ValueError(f"{' and '.join(named)} are different ways to choose ranks: take one of them")
        if self.max_rank == 0:
            object.__setattr__(self, "max_rank", POLICY_MAX_RANK if named else self.rank)
        if self.carry == "all" and self.dialect != "peft":
            raise ValueError(
                f"carry all needs dialect peft (--for peft): what servers take as {self.dialect} has no place for norms and biases; vLLM and llama.cpp refuse modules_to_save"
            )
        if self.policy.chooses and self.rank != "auto":
            object.__setattr__(self, "rank", self.max_rank)
        least = 1 if self.rank == "auto" else self.rank
        if not least <= self.max_rank <= MAX_RANK:
            raise ValueError(f"max_rank must be between rank ({least}) and {MAX_RANK}, got {self.max_rank}")
        out = _real(self.out)
        for name in ("base", "tuned"):
            source = _real(getattr(self, name))
            # A checkpoint given as a file: its folder would become an adapter, and a checkpoint no more.
            folder = source.rpartition("/")[0] if source.endswith(".safetensors") else source
            if out in {source, folder} or out.startswith(source + "/"):
                raise ValueError(f"the output {self.out} lies inside the {name} checkpoint {source}")
        return self

    @property
    def policy(self) -> Policy:
        """How ranks are chosen."""
        return Policy(self.energy, self.rank == "auto", Budget.parse(self.budget) if self.budget else None)

    @property
    def most_rank(self) -> int:
        """The rank, or the most that a policy may choose."""
        return self.max_rank if self.rank == "auto" else self.rank


def _real(url: str) -> str:
    """A local path with its links followed, so that a link to a checkpoint is that checkpoint."""
    return os.path.realpath(url) if url.startswith("/") else url


def read_profile(url: str) -> Profile:
    """The rates of a device, as `phlora calibrate` wrote them.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """
    from phlora_pipeline.lowrank import PROFILES, Profile

    try:
        info = storage.stat(storage.normalize(url))
        profile = TypeAdapter(Profile).validate_json(storage.read_object(info, limit=1 << 20) if info else b"")
    except ValueError as error:
        raise RequestError(
            f"{url} is not a device profile: {' '.join(str(error).split())[:200]}",
            remedy="write one by phlora calibrate --out FILE",
        ) from error
    if profile.name in PROFILES:
        raise RequestError(f"{url} calls itself {profile.name!r}, a profile that is built in", remedy="give it a name")
    return profile


def run_config(**settings: object) -> RunConfig:
    """A validated `RunConfig`.

    Raises:
        RequestError: a setting is unknown or wrong; names it in one line.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        text = str(first["msg"])
        own = text.removeprefix("Value error, ")
        if own == text and isinstance(first["input"], str | int | float):
            own = f"{text}, got {quoted(first['input'])}"
        told = own if own.startswith(where) else f"{where}: {own}"
        raise RequestError(told, remedy="see phlora extract --help") from error
