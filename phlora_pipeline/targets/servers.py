"""What the servers of a dialect take of a model type: `servers.toml` in values."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from phlora_pipeline.targets.kinds import Kind

Dialect = Literal["portable", "peft", "vllm", "sglang", "nim", "gguf", "kohya"]


@dataclass(frozen=True, slots=True)
class ServerRules:
    """What the dialect's servers take of one model type: what each single one of them takes.

    Attributes:
        dialect: for whom.
        model_type: as in `config.json`; may be unknown or empty.
        takes: server's name → kinds of modules that it applies.
        listed: whether `servers.toml` knows the type.
        carries: kinds of tensors that may be carried whole.
        max_rows: most rows of an adapted embedding or lm_head, or None.
        max_rank: the largest rank, or None.
        rank_grid: ranks that are written, smallest first; empty where any is.
        tied_embeddings: whether a tied pair may carry its delta on both ends.
        per_tensor_ranks: whether each module may have a rank of its own.
        rslora: whether a scale over the root of the rank is read.
        target_pattern: whether `target_modules` may be a regular expression.
        unets_only: whether it is for UNets of diffusion models alone, whose adapters have kohya's keys.
        stacked_experts: whether the type's experts are taken as one parameter for all of them.
        renames_experts: whether the keys of single experts go with a config that names the parameters that they become.
        whole_families: whether what servers fuse or stack must be whole, with zero pairs in the gaps.
    """

    dialect: Dialect
    model_type: str
    takes: Mapping[str, frozenset[Kind]]
    listed: bool
    carries: frozenset[Kind]
    max_rows: int | None
    max_rank: int | None
    rank_grid: tuple[int, ...]
    tied_embeddings: bool
    per_tensor_ranks: bool
    rslora: bool
    target_pattern: bool
    unets_only: bool
    stacked_experts: bool
    renames_experts: bool
    whole_families: bool

    @property
    def kinds(self) -> frozenset[Kind]:
        """Kinds of modules that every server applies."""
        return frozenset.intersection(*self.takes.values())

    def refusing(self, kind: Kind) -> str:
        """The servers that do not apply a kind, in words."""
        return ", ".join(name for name, kinds in self.takes.items() if kind not in kinds)


@cache
def server_rules(model_type: str, dialect: Dialect) -> ServerRules:
    """Rules of a dialect for a model type: what all of its servers in `servers.toml` have in common."""
    servers = [_servers()["servers"][name] for name in _servers()["dialects"][dialect]]
    grids = [frozenset(server["rank_grid"]) for server in servers if "rank_grid" in server]
    return ServerRules(
        dialect,
        model_type,
        takes={server["name"]: _taken(server, model_type) for server in servers},
        listed=model_type in model_types(),
        carries=frozenset.intersection(*(frozenset(server["carries"]) for server in servers)),
        max_rows=_least(server["max_rows"] for server in servers),
        max_rank=_least(server["max_rank"] for server in servers),
        rank_grid=tuple(sorted(frozenset.intersection(*grids))) if grids else (),
        tied_embeddings=all(server["tied"] for server in servers),
        per_tensor_ranks=all(server["per_tensor_ranks"] for server in servers),
        rslora=all(server["rslora"] for server in servers),
        target_pattern=all(server["target_pattern"] for server in servers),
        unets_only=any(server["unets_only"] for server in servers),
        stacked_experts=all(model_type in server["stacked_experts"] for server in servers),
        renames_experts=all(model_type in server.get("renamed_experts", ()) for server in servers),
        whole_families=any(server["whole_families"] for server in servers),
    )


def _taken(server: Mapping[str, Any], model_type: str) -> frozenset[Kind]:
    if is_conv1d(model_type) and not server["conv1d"]:
        return frozenset()
    return frozenset([*server["any_type"], *server["types"].get(model_type, ())])


def _least(limits: Iterable[int]) -> int | None:
    """The smallest limit; 0 is none."""
    return min((limit for limit in limits if limit), default=None)


@cache
def dialects() -> tuple[Dialect, ...]:
    """Every dialect, in the order of `servers.toml`."""
    return tuple(_servers()["dialects"])


@cache
def model_types() -> tuple[str, ...]:
    """Every model type of which `servers.toml` says anything."""
    named = {name for server in _servers()["servers"].values() for name in server["types"]}
    return tuple(sorted(named | set(_servers()["types"])))


def is_conv1d(model_type: str) -> bool:
    """Whether a type's layers are transformers' `Conv1D`, whatever they are called."""
    return bool(_servers()["types"].get(model_type, {}).get("conv1d"))


def is_transposed(module: str, model_type: str) -> bool:
    """Whether the checkpoint stores this matrix as (in, out), as transformers' `Conv1D` does."""
    return module.rpartition(".")[2] in _servers()["types"].get(model_type, {}).get("transposed", ())


def expert_names(model_type: str) -> Mapping[str, str]:
    """How checkpoints of single experts spell `gate`, `up` and `down`, and the `block` around the experts where it has a name of its own there."""
    plain = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    names: Mapping[str, str] = _servers()["types"].get(model_type, {}).get("expert_names", plain)
    return names


def takes_parameters(model_type: str, dialect: Dialect) -> bool:
    """Whether experts, stacked, and routers are adapted as parameters, not as modules."""
    return server_rules(model_type, dialect).stacked_experts


def names_parameters(model_type: str, dialect: Dialect) -> bool:
    """Whether routers, and experts one by one, are in the config by the parameters that hold them in memory."""
    return server_rules(model_type, dialect).renames_experts


def written_rank(rank: int, grid: Sequence[int]) -> int:
    """The rank that is written: the next of the grid, or `rank` itself where there is none.

    >>> written_rank(20, (1, 8, 16, 32)), written_rank(20, ())
    (32, 20)
    """
    return next((step for step in grid if step >= rank), rank)


def server_refusal(kind: Kind, shape: Sequence[int], rules: ServerRules) -> str:
    """Why the dialect's servers would not take a matrix; empty where they do."""
    if kind not in rules.kinds:
        if rules.dialect == "peft":
            return f"PEFT does not find kind {kind} of model type {rules.model_type!r} by its name in the checkpoint"
        who = f"model type {rules.model_type!r}" if rules.listed else f"the unlisted model type {rules.model_type!r}"
        what = "a Conv1D" if is_conv1d(rules.model_type) and kind in {"attention", "mlp"} else f"kind {kind}"
        return f"{what} of {who} is not known to be applied by {rules.refusing(kind)}{_remedy(kind, rules)}"
    if kind in {"embedding", "lm_head"} and rules.max_rows is not None and shape[0] > rules.max_rows:
        return f"servers take at most {rules.max_rows} rows, this has {shape[0]}; --for peft adapts it"
    return ""


def _remedy(kind: Kind, rules: ServerRules) -> str:
    return "; --for peft adapts it" if kind in server_rules(rules.model_type, "peft").kinds else ""


@cache
def _servers() -> dict[str, Any]:
    return tomllib.loads(resources.files("phlora_pipeline").joinpath("servers.toml").read_text())
