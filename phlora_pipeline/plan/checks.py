"""What a plan refuses, and what it warns of: from headers alone. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from phlora_pipeline.checkpoint import Checkpoint
from phlora_pipeline.errors import RequestError
from phlora_pipeline.plan.blocks import TensorPair
from phlora_pipeline.plan.choice import multimodal, some
from phlora_pipeline.quantised import FP8
from phlora_pipeline.ranks import Policy
from phlora_pipeline.targets import ServerRules


def require_same_model(base: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse what cannot be a model and its fine-tune, with the names that tell."""
    common = base.tensors.keys() & tuned.tensors.keys()
    told = (
        f"{len(common)} of the fine-tune's {len(tuned.tensors)} tensor names are in the base, which has {len(base.tensors)}"
        f" (only in the base: {some(base.tensors.keys() - common)}; only in the fine-tune: {some(tuned.tensors.keys() - common)})"
    )
    if base.model_type and tuned.model_type and base.model_type != tuned.model_type:
        raise RequestError(
            f"different architectures: the base is {base.model_type!r}, the fine-tune {tuned.model_type!r}; {told}",
            remedy="give the base that this model was fine-tuned from",
        )
    if 2 * len(common) < len(tuned.tensors) or not common:
        raise RequestError(
            f"different architectures: {told}",
            remedy="give the base that this model was fine-tuned from, saved by the same library",
        )


def require_served(rank: int, rules: ServerRules) -> None:
    """Refuse what no server of the dialect takes."""
    if rules.unets_only and rules.model_type:
        raise RequestError(
            f"--for {rules.dialect} is for the UNets of diffusion models, this is a transformers model of type {rules.model_type!r}",
            remedy="use --for portable, or --for peft",
        )
    if rules.max_rank is not None and rank > rules.max_rank:
        raise RequestError(
            f"rank {rank} is more than the {rules.max_rank} that servers of --for {rules.dialect} take",
            remedy=f"ask for at most {rules.max_rank}",
        )


def shares_a_rank(chosen: Sequence[TensorPair], policy: Policy) -> bool:
    """Experts and routers keep the adapter's rank: a budget would pay the largest rank for all of them."""
    return policy.budget is not None and any(pair.kind in {"expert", "router"} for pair in chosen)


def one_rank_for_all(policy: Policy, rules: ServerRules, *, per_tensor: bool) -> Iterator[str]:
    """Where ranks are chosen, and cannot be written as chosen."""
    if not policy.chooses or per_tensor:
        return
    who = f"--for {rules.dialect} has one rank for all tensors"
    if rules.per_tensor_ranks:
        yield "experts share one rank: within this budget all tensors have the largest rank that fits"
    elif policy.budget is not None:
        yield f"{who}: it will be the largest that fits the budget; --for peft and --for vllm spend it where it keeps most"
    else:
        yield f"{who}: each is zero-padded to the largest; --for peft and --for vllm write each at its own"


def require_names_apart(chosen: Sequence[TensorPair]) -> None:
    """Two modules may differ by a dot where kohya's names have the same underscore."""
    names: dict[str, str] = {}
    for pair in chosen:
        other = names.setdefault(pair.module.replace(".", "_"), pair.module)
        if other != pair.module:
            raise RequestError(
                f"{other} and {pair.module} are both {pair.module.replace('.', '_')} in kohya's names",
                remedy="leave one of them out: --exclude 'GLOB'",
            )


def nothing_matches(left_out: Mapping[str, str], unread: Mapping[str, str]) -> RequestError:
    """An error that says why, by the most frequent reasons."""
    reasons: dict[str, int] = {}
    for reason in (*left_out.values(), *unread.values()):
        reasons[reason] = reasons.get(reason, 0) + 1
    most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:4]
    told = "; ".join(f"{count} × {reason}" for reason, count in most)
    return RequestError(
        f"nothing to adapt: no tensor is a target ({told})",
        remedy="look at phlora plan, and change --targets, --include, --exclude or --for",
    )


def warnings_about(
    base: Checkpoint, tuned: Checkpoint, pairs: Sequence[TensorPair], *, rank: int, written: int
) -> Iterator[str]:
    """What the user should know of the pair before it runs.

    Args:
        base, tuned: the checkpoints.
        pairs: that are compared.
        rank, written: of the adapter, as asked for and as written.
    """
    if tuned.matched:
        yield tuned.matched
    coarse = sum(bool({pair.base.dtype, pair.tuned.dtype} & FP8) for pair in pairs)
    if coarse:
        yield f"{coarse} tensors are stored in fp8: its rounding, 2 to 5 % of each weight, is part of the difference; checkpoints in bf16 make a better adapter, where there are any"
    missing = sorted(set(base.tensors) - set(tuned.tensors))
    if missing:
        yield f"{len(missing)} tensors of the base are not in the fine-tune: {some(missing)}"
    if written != rank:
        yield f"rank {rank} is written as {written}, zero-padded: the next rank that servers compute with"
    if _has_head(tuned, base) and any("." not in pair.module for pair in pairs if pair.kind == "embedding"):
        yield "the tensors' names lack the prefix that they have in memory under the model's head: loaders will find no module; save the whole model by save_pretrained first"
    if multimodal(base, tuned):
        yield "a multimodal model: only its language model is adapted, and loaders may know that by other names; see that your loader reports no unexpected keys"


def _has_head(*sides: Checkpoint) -> bool:
    return any("For" in name or "LMHead" in name for side in sides for name in side.architectures)
