"""Do base and adapter together answer as the fine-tune does? Through the real transformers and PEFT, where these are installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phlora_pipeline import storage
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.errors import RequestError

_PROMPTS, _TOKENS = 4, 32


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one model's next-token distributions are from the fine-tune's, over all positions.

    Attributes:
        positions: how many were compared.
        kl: mean of KL(fine-tune ‖ base with adapter), in nats.
        top1: share of positions at which both name the same token first.
        base_kl, base_top1: the same of the base alone.
    """

    positions: int
    kl: float
    top1: float
    base_kl: float
    base_top1: float


def compare(
    base_url: str, tuned_url: str, adapter_url: str, prompts: Sequence[str] = (), *, device: str = "cpu"
) -> Agreement:
    """Run all three on the same tokens, in float32.

    Args:
        base_url, tuned_url: causal models' folders, on this machine.
        adapter_url: a PEFT folder, likewise.
        prompts: texts for the fine-tune's tokenizer; without any, tokens are drawn at random from the vocabulary.
        device: where to run.

    Raises:
        RequestError: the libraries are not installed, a folder is elsewhere, or it holds no causal model.
    """
    try:
        import transformers
        from peft import PeftModel
    except ImportError as error:
        raise RequestError(
            f"--logits needs transformers and peft: {error}", remedy="pip install 'phlora-pipeline[demo]'"
        ) from error
    base_folder, tuned_folder, adapter_folder = (_local(url) for url in (base_url, tuned_url, adapter_url))
    tuned = _model(transformers, tuned_folder).to(device)
    tokens = _tokens(transformers, tuned_folder, tuned.config.get_text_config().vocab_size, prompts)
    wanted = [_log_probabilities(tuned, one, device) for one in tokens]
    del tuned
    base = _model(transformers, base_folder).to(device)
    alone = [_log_probabilities(base, one, device) for one in tokens]
    adapted = PeftModel.from_pretrained(base, adapter_folder).eval()  # changes the base, which has answered
    found = [_log_probabilities(adapted, one, device) for one in tokens]
    (kl, top1), (base_kl, base_top1) = _distance(wanted, found), _distance(wanted, alone)
    return Agreement(sum(one.shape[0] for one in wanted), kl, top1, base_kl, base_top1)


def _local(url: str) -> str:
    folder = storage.normalize(url)
    if not folder.startswith("/"):
        raise RequestError(f"--logits loads whole models, {folder} is not on this machine", remedy="copy it here first")
    return folder


def _model(transformers: Any, folder: str) -> Any:
    names = [name for name in open_checkpoint(folder).architectures if "ForCausalLM" in name or "LMHead" in name]
    if not names:
        raise RequestError(f"{folder} holds no causal language model", remedy="leave --logits out")
    return getattr(transformers, names[0]).from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _tokens(transformers: Any, folder: str, vocabulary: int, prompts: Sequence[str]) -> list[Tensor]:
    if not prompts:
        drawn = torch.randint(vocabulary, (_PROMPTS, _TOKENS), generator=torch.Generator().manual_seed(0))
        return list(drawn[:, None])
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder} has no tokenizer for --prompt", remedy="leave --prompt out") from error
    return [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]


@torch.no_grad()
def _log_probabilities(model: Any, tokens: Tensor, device: str) -> Tensor:
    """(positions, vocabulary)."""
    found: Tensor = model(input_ids=tokens.to(device)).logits[0].double().log_softmax(-1).cpu()
    return found


def _distance(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """Mean KL(wanted ‖ found) over the tokens that both know, and the share of equal first choices."""
    divergences, same = [], []
    for p, q in zip(wanted, found, strict=True):
        shared = min(p.shape[-1], q.shape[-1])
        p_shared, q_shared = (side[:, :shared].log_softmax(-1) for side in (p, q))
        divergences.append((p_shared.exp() * (p_shared - q_shared)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    return float(torch.cat(divergences).mean()), float(torch.cat(same).double().mean())
