"""The network of pair 2: an encoder–decoder that writes the IMGT number of each residue of an antigen receptor.

The architecture is anarcii's (BSD-3), with all its weights and its tensor names but one: it holds query, key and value in
`nn.MultiheadAttention`, as a bare parameter `in_proj_weight`. No LoRA on disk can name that (an adapter's keys are modules'
names), and PEFT's own wrapper for it gives the two projections inside one name of its own. Here they are `nn.Linear`
modules, `in_proj` and `out_proj`: the same numbers, and every matrix is the weight of a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

PAD, START, END = 0, 1, 2
_RESIDUES = {residue: 4 + number for number, residue in enumerate("ACDEFGHIKLMNPQRSTVWXY")}
_INPUTS, _OUTPUTS, _POSITIONS, _WIDTH, _HEADS, _LAYERS = 25, 136, 210, 128, 4, 2


def linear_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint under this module's names: `in_proj_weight` becomes `in_proj.weight`, its bias likewise."""
    return {name.replace("in_proj_", "in_proj."): tensor for name, tensor in state.items()}


def tokenize(sequence: str) -> Tensor:
    """Residues between start and end; one that is not among the twenty reads as X.

    >>> tokenize("AB").tolist()
    [1, 4, 23, 2]
    """
    return torch.tensor([START, *(_RESIDUES.get(residue, _RESIDUES["X"]) for residue in sequence), END])


class Attention(nn.Module):
    """`nn.MultiheadAttention` with its projections as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.out_proj = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, queries: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """Queries (n, t, width) look at memory (n, s, width) where `seen` (n, 1, t or 1, s) is true."""
        # in_proj runs over both inputs whole, and of each only its part is used: so a LoRA on it acts on all three.
        query = self.in_proj(queries)[..., :_WIDTH]
        key, value = self.in_proj(memory)[..., _WIDTH:].chunk(2, -1)
        split = [part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in (query, key, value)]
        mixed = scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=seen)
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected


class Held(nn.Module):
    """Attention one level down, where the checkpoint's names have it."""

    def __init__(self) -> None:
        super().__init__()
        self.multihead_attn = Attention()

    def forward(self, queries: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """As `Attention`."""
        mixed: Tensor = self.multihead_attn(queries, memory, seen)
        return mixed


class FeedForward(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.fc_2 = nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) → the same."""
        out: Tensor = self.fc_2(torch.relu(self.fc_1(x)))
        return out


class Layer(nn.Module):
    """Self-attention, in the decoder a look at the encoder, and a feed-forward part; norms after each."""

    def __init__(self, *, crossed: bool) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(_WIDTH)
        self.ff_layer_norm = nn.LayerNorm(_WIDTH)
        self.self_attention = Held()
        self.positionwise_feedforward = FeedForward()
        if crossed:
            self.enc_attn_layer_norm = nn.LayerNorm(_WIDTH)
            self.encoder_attention = Held()

    def forward(self, x: Tensor, history: Tensor, seen: Tensor, source: Tensor | None, source_seen: Tensor) -> Tensor:
        """States x (n, t, width) after looking at `history`, and at `source` where there is one."""
        x = self.self_attn_layer_norm(x + self.self_attention(x, history, seen))
        if source is not None:
            x = self.enc_attn_layer_norm(x + self.encoder_attention(x, source, source_seen))
        out: Tensor = self.ff_layer_norm(x + self.positionwise_feedforward(x))
        return out


class Stack(nn.Module):
    """Embeddings and layers; the encoder, or with a head the decoder."""

    def __init__(self, tokens: int, *, head: bool) -> None:
        super().__init__()
        self.tok_embedding = nn.Embedding(tokens, _WIDTH)
        self.pos_embedding = nn.Embedding(_POSITIONS, _WIDTH)
        self.layers = nn.ModuleList(Layer(crossed=head) for _ in range(_LAYERS))
        if head:
            self.fc_out = nn.Linear(_WIDTH, tokens)

    def embed(self, tokens: Tensor, first: int) -> Tensor:
        """Token and position embeddings of (n, t) tokens, the first of which stands at position `first`."""
        positions = torch.arange(first, first + tokens.shape[1]).expand_as(tokens)
        out: Tensor = self.tok_embedding(tokens) * _WIDTH**0.5 + self.pos_embedding(positions)
        return out


class Numberer(nn.Module):
    """Sequence in, one number token per residue out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack(_INPUTS, head=False)
        self.decoder = Stack(_OUTPUTS, head=True)

    def encode(self, source: Tensor, seen: Tensor) -> Tensor:
        """Source tokens (n, s) → states (n, s, width)."""
        x = self.encoder.embed(source, 0)
        for layer in self.encoder.layers:
            x = layer(x, x, seen, None, seen)
        return x

    @torch.no_grad()
    def forward(self, sequences: Sequence[str]) -> list[list[int]]:
        """Greedy decoding: for each sequence the tokens up to its end token, or as many as it has residues and two."""
        source = pad_sequence([tokenize(sequence) for sequence in sequences], batch_first=True)
        source_seen = (source != PAD)[:, None, None, :]
        states = self.encode(source, source_seen)
        written = source[:, :1]
        histories: list[Tensor | None] = [
            None
        ] * _LAYERS  # inputs of each layer so far: keys and values are made of them
        for position in range(source.shape[1]):
            x = self.decoder.embed(written[:, -1:], position)
            seen = (written != PAD)[:, None, None, :]
            for number, layer in enumerate(self.decoder.layers):
                past = histories[number]
                histories[number] = history = x if past is None else torch.cat([past, x], 1)
                x = layer(x, history, seen, states, source_seen)
            written = torch.cat([written, self.decoder.fc_out(x).argmax(-1)], 1)
        return [cut(row, len(sequence) + 2) for row, sequence in zip(written[:, 1:].tolist(), sequences, strict=True)]


def cut(tokens: Sequence[int], most: int) -> list[int]:
    """Tokens up to the first end token, and no more than `most`.

    >>> cut([5, 6, 2, 7], 9), cut([5, 6, 7], 2)
    ([5, 6, 2], [5, 6])
    """
    kept = list(tokens[:most])
    return kept[: kept.index(END) + 1] if END in kept else kept


def agreement(found: Iterable[Sequence[int]], wanted: Iterable[Sequence[int]]) -> float:
    """Share of rows that are equal, token for token.

    >>> agreement([[1, 2], [3]], [[1, 2], [4]])
    0.5
    """
    equal = [list(one) == list(other) for one, other in zip(found, wanted, strict=True)]
    return sum(equal) / len(equal)
