"""Adapters that are no plain low-rank update of the base, by name and with the reason. Pure.

Sources: PEFT 0.21.2 (tuners/lora/config.py, layer.py, variants.py), kohya's sd-scripts and LyCORIS for the keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_VARIANTS = {
    "use_dora": "DoRA: each column of the merged weight is rescaled, so that the update depends on the base",
    "alora_invocation_tokens": "aLoRA: the update applies to some of a prompt's tokens only",
    "use_qalora": "QALoRA: its inputs are pooled in groups, and A is no factor of the update by itself",
    "use_bdlora": "BD-LoRA: its factors are block-diagonal, which a smaller rank is not",
    "arrow_config": "Arrow: a router mixes several adapters token by token",
    "kasa_config": "KaSA: the base itself was truncated, and a diagonal lies between the factors",
    "monteclora_config": "MonteCLoRA: its factors are sampled",
    "layer_replication": "layer replication: the model that it is for has more layers than the base",
    "trainable_token_indices": "trainable tokens: rows of the embedding are replaced beside the factors",
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take B·A off the base before the training. EVA, MiCA, Gaussian and orthogonal ones begin with B·A = 0."""

_KEYS = (
    (re.compile(r"\.lora_magnitude_vector|\.dora_scale$"), _VARIANTS["use_dora"]),
    (re.compile(r"\.hada_"), "LoHa: the update is a Hadamard product, and its rank is not the factors'"),
    (re.compile(r"\.lokr_"), "LoKr: the update is a Kronecker product"),
    (re.compile(r"\.lora_mid\."), "LoCon in Tucker's form: a third factor lies between the two"),
    (re.compile(r"\.(oft_|boft_)"), "OFT: the base is rotated"),
    (re.compile(r"\.lora_E(\.|$)"), "AdaLoRA: singular values lie between the factors"),
    (re.compile(r"\.(diff|diff_b|set_weight)$"), "a full difference, which is no pair of factors"),
    (re.compile(r"\.token_adapter\."), _VARIANTS["trainable_token_indices"]),
)
_METHODS = {
    "LOHA": "its update is a Hadamard product, whose rank is not the factors'",
    "LOKR": "its update is a Kronecker product",
    "ADALORA": "singular values lie between the factors, and are pruned",
    "IA3": "it rescales activations",
    "VERA": "its factors are random and shared, and only their scales are in the file",
    "OFT": "it rotates the base",
    "BOFT": "it rotates the base",
    "XLORA": "a router mixes several adapters token by token",
}


def of_config(config: Mapping[str, Any]) -> str:
    """Why an `adapter_config.json` is not that of a plain LoRA, in words; empty where it is."""
    kind = config.get("peft_type")
    if kind is None and config.get("format") == "kohya":
        return ""
    if kind != "LORA":
        return f"{kind}: {_METHODS.get(str(kind), 'it is not a LoRA')}"
    if found := next((why for name, why in _VARIANTS.items() if config.get(name)), ""):
        return found
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        return (
            f"init_lora_weights {start!r}: the training began by taking its own B·A off the base, so that this adapter is for"
            " another base than the one it names; PEFT converts it where save_pretrained is given"
            " path_initial_model_for_weight_conversion"
        )
    return ""


def of_keys(keys: Iterable[str]) -> str:
    """The same by the names of its tensors."""
    for key in keys:
        for pattern, why in _KEYS:
            if pattern.search(key):
                return f"{why} ({key})"
    return ""
