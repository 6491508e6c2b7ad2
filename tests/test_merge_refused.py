"""What does not fit is refused before a byte is written, by name; and the sums themselves, small enough to be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.compress import compress
from phlora_pipeline.errors import RequestError
from phlora_pipeline.merge import changes
from phlora_pipeline.merge.changes import Change, Product, Whole
from tests import runs, toys
from tests.test_merge_copy import contents, merged, tensors_of

LAYER = "model.layers.0.self_attn"


def config(**others: object) -> dict[str, object]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **others}


def adapter(folder: Path, tensors: dict[str, Tensor], **others: object) -> Path:
    """Of any keys, without PEFT's prefix."""
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config(**others)))
    return folder


def pair(module: str, d: int, k: int, *, embedding: bool = False, rank: int = 2, seed: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, k, generator=generator), torch.randn(d, rank, generator=generator)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return {f"{module}.{name}": value for name, value in zip(names, (A, B), strict=True)}


def tied_pair(rows: int, columns: int, *, rank: int = 2) -> dict[str, Tensor]:
    """The update of an embedding, and the same of the output that is tied to it."""
    inner = pair("model.embed_tokens", columns, rows, embedding=True, rank=rank)
    A, B = inner.values()
    return {**inner, "lm_head.lora_A.weight": B.mT.contiguous(), "lm_head.lora_B.weight": A.mT.contiguous()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.save(tmp_path / "base", toys.llama_tensors(layers=1), shards=2)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    tensors = toys.llama_tensors(layers=1)
    del tensors["lm_head.weight"]
    return toys.save(tmp_path / "tied", tensors, {**toys.LLAMA, "tie_word_embeddings": True})


def refusal(base: Path, *adapters: Path | tuple[Path, float], out: Path) -> RequestError:
    with pytest.raises(RequestError) as caught:
        merged(base, *adapters, out=out)
    assert caught.value.exit_code == 2
    assert not out.exists()
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (pair("model.layers.7.self_attn.q_proj", 32, 32), "the base has no model.layers.7.self_attn.q_proj"),
        (pair(f"{LAYER}.k_proj", 32, 32), f"{LAYER}.k_proj is 32 × 32, {LAYER}.k_proj.weight of the base is [16, 32]"),
        ({**pair("model.layers.1.mlp.up_proj", 48, 32), **pair(f"{LAYER}.q_proj", 32, 32)}, "1 of its 2 modules fit; the base has no model.layers.1.mlp.up_proj"),
    ],
    ids=["module", "shape", "one-of-two"],
)  # fmt: skip
def test_an_adapter_of_another_base(tensors: dict[str, Tensor], told: str, base: Path, tmp_path: Path) -> None:
    assert told in refusal(base, adapter(tmp_path / "lora", tensors), out=tmp_path / "out").what


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [f"{LAYER}.q_proj.lora_A.weight", f"{LAYER}.q_proj.lora_B.weight", "model.norm.weight"])
def test_what_is_no_number_is_found_before_anything_is_written(key: str, bad: float, tmp_path: Path) -> None:
    base = toys.save(tmp_path / "base", {**toys.llama_tensors(layers=1), "model.norm.weight": torch.ones(32)})
    tensors = {**pair(f"{LAYER}.q_proj", 32, 32), "model.norm.weight": torch.zeros(32)}
    tensors[key].view(-1)[7] = bad
    lora = adapter(tmp_path / "lora", tensors, modules_to_save=["norm"])
    assert "1 entries that are NaN or infinite" in refusal(base, lora, out=tmp_path / "out").what


def test_a_weight_that_is_no_number(base: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", pair(f"{LAYER}.q_proj", 32, 32))
    assert "nan is no weight" in refusal(base, (lora, float("nan")), out=tmp_path / "out").what


def test_two_that_keep_the_same_tensor(base: Path, tmp_path: Path) -> None:
    name = f"{LAYER.rpartition('.')[0]}.input_layernorm.weight"
    tensors = {**pair(f"{LAYER}.q_proj", 32, 32), name: torch.ones(32)}
    loras = [adapter(tmp_path / each, tensors, modules_to_save=["input_layernorm"]) for each in ("one", "two")]
    told = refusal(base, *loras, out=tmp_path / "out").what
    assert name in told
    assert "one" in told
    assert "two" in told
    merged(base, loras[0], out=tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[name], torch.ones(32))


def test_what_is_kept_must_have_a_place_and_its_shape(base: Path, tmp_path: Path) -> None:
    for key, value, told in (
        ("model.final.weight", torch.ones(32), "has no tensor of that name"),
        (f"{LAYER}.k_proj.weight", torch.ones(16, 31), "the base has F32 [16, 32]"),
        ("lm_head.weight", torch.ones(64, 32, dtype=torch.int32), "keeps lm_head.weight as I32"),
    ):
        tensors = {**pair(f"{LAYER}.q_proj", 32, 32), key: value}
        lora = adapter(tmp_path / "lora", tensors, modules_to_save=["final", "k_proj", "lm_head"])
        assert told in refusal(base, lora, out=tmp_path / "out").what


def test_a_bias_needs_a_place_unless_it_is_zero(base: Path, tmp_path: Path) -> None:
    tensors = {**pair(f"{LAYER}.q_proj", 32, 32), f"{LAYER}.q_proj.lora_B.bias": torch.zeros(32)}
    merged(base, adapter(tmp_path / "zero", tensors, lora_bias=True), out=tmp_path / "zeros")
    tensors[f"{LAYER}.q_proj.lora_B.bias"] = torch.ones(32)
    lora = adapter(tmp_path / "lora", tensors, lora_bias=True)
    assert f"{LAYER}.q_proj.bias, which is not there" in refusal(base, lora, out=tmp_path / "out").what


def test_an_adapter_that_keeps_half_of_a_grown_vocabulary(base: Path, tmp_path: Path) -> None:
    tensors = {**pair(f"{LAYER}.q_proj", 32, 32), "model.embed_tokens.weight": torch.ones(66, 32)}
    lora = adapter(tmp_path / "lora", tensors, modules_to_save=["embed_tokens"])
    told = refusal(base, lora, out=tmp_path / "out").what
    assert "from 64 rows to 66" in told
    assert "lm_head.weight does not" in told


def test_a_grown_vocabulary_needs_a_config_that_says_how_large_it_is(base: Path, tmp_path: Path) -> None:
    rows = {name: torch.ones(66, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors = {**pair(f"{LAYER}.q_proj", 32, 32), **rows}
    lora = adapter(tmp_path / "lora", tensors, modules_to_save=["embed_tokens", "lm_head"])
    assert "no vocab_size" in refusal(base, lora, out=tmp_path / "out").what
    (base / "config.json").write_text(json.dumps({**toys.LLAMA, "text_config": {"vocab_size": 64}}))
    merged(base, lora, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"] == {"vocab_size": 66}


class TestTies:
    """One matrix for both ends."""

    def test_the_update_is_added_once(self, tied: Path, tmp_path: Path) -> None:
        tensors = tied_pair(64, 32)
        merged(tied, adapter(tmp_path / "lora", tensors), out=tmp_path / "out")
        A, B = list(tensors.values())[:2]
        wanted = tensors_of(tied)["model.embed_tokens.weight"].double() + (B.double() @ A.double()).mT
        found = tensors_of(tmp_path / "out")
        assert torch.allclose(found["model.embed_tokens.weight"].double(), wanted, atol=1e-6)
        assert "lm_head.weight" not in found

    def test_ends_that_were_rounded_each_for_itself_are_the_same(self, tied: Path, tmp_path: Path) -> None:
        tensors = tied_pair(64, 32)
        tensors["lm_head.lora_A.weight"] *= 2
        tensors["lm_head.lora_B.weight"] /= 2 * (1 + 1e-7)
        merged(tied, adapter(tmp_path / "lora", tensors), out=tmp_path / "out")

    def test_ends_that_were_compressed_each_for_itself_are_the_same(self, tmp_path: Path) -> None:
        """In bf16 some of their entries are rounded another way, and the product is another in its third digit."""
        tensors = {key: value.bfloat16() for key, value in tied_pair(65536, 32, rank=8).items()}
        lora = adapter(tmp_path / "lora", tensors, r=8)
        compress(str(lora), str(tmp_path / "smaller"), rank=4, dialect="peft")
        assert "adds it once" in (tmp_path / "smaller" / "README.md").read_text()
        base = toys.save(tmp_path / "base", {"model.embed_tokens.weight": torch.zeros(65536, 32)}, {**toys.LLAMA, "tie_word_embeddings": True})  # fmt: skip
        assert merged(base, tmp_path / "smaller", out=tmp_path / "out").changed == 1

    @pytest.mark.parametrize("end", ["model.embed_tokens", "lm_head"])
    def test_one_end_only_is_refused(self, end: str, tied: Path, tmp_path: Path) -> None:
        tensors = {key: value for key, value in tied_pair(64, 32).items() if key.startswith(end)}
        told = refusal(tied, adapter(tmp_path / "lora", tensors), out=tmp_path / "out")
        assert f"only {end} is changed" in told.what
        assert "untie the base first" in told.remedy

    def test_two_different_ends_are_refused(self, tied: Path, tmp_path: Path) -> None:
        tensors = tied_pair(64, 32)
        tensors["lm_head.lora_B.weight"][5, 1] += 0.01
        assert "the two differ" in refusal(tied, adapter(tmp_path / "lora", tensors), out=tmp_path / "out").what

    @pytest.mark.parametrize("same", [True, False])
    def test_ends_that_are_kept_whole(self, same: bool, tied: Path, tmp_path: Path) -> None:
        kept = torch.randn(64, 32)
        other = kept.clone() if same else kept + 1
        tensors = {**pair(f"{LAYER}.q_proj", 32, 32), "model.embed_tokens.weight": kept, "lm_head.weight": other}
        lora = adapter(tmp_path / "lora", tensors, modules_to_save=["embed_tokens", "lm_head"])
        if same:
            merged(tied, lora, out=tmp_path / "out")
            assert torch.equal(tensors_of(tmp_path / "out")["model.embed_tokens.weight"], kept)
        else:
            assert "the two differ" in refusal(tied, lora, out=tmp_path / "out").what

    def test_untied_ends_go_each_its_way(self, base: Path, tmp_path: Path) -> None:
        tensors = {key: value for key, value in tied_pair(64, 32).items() if key.startswith("lm_head")}
        merged(base, adapter(tmp_path / "lora", tensors), out=tmp_path / "out")
        before, after = tensors_of(base), tensors_of(tmp_path / "out")
        assert [name for name in before if not torch.equal(before[name], after[name])] == ["lm_head.weight"]


class TestSums:
    """`changes.merged`, on one tensor."""

    @pytest.mark.parametrize("block", [1, 7, 40, 1 << 20])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_blocks_of_any_size_give_the_sum(self, block: int, dtype: torch.dtype, tmp_path: Path) -> None:
        """Several products, over all rows and over some, and one rounding: that of the exact sum, or its neighbour."""
        generator = torch.Generator().manual_seed(1)
        W = torch.randn(12, 8, generator=generator).to(dtype)
        toys.save(tmp_path, {"w": W})
        ref = open_checkpoint(str(tmp_path)).tensors["w"]
        pieces = [(first, torch.randn(rows, 3, generator=generator), torch.randn(3, 8, generator=generator)) for first, rows in ((0, 12), (0, 5), (5, 7), (3, 4))]  # fmt: skip
        products = tuple(Product(first, len(B), lambda B=B, A=A: (B, A), 0.5) for first, B, A in pieces)
        found = torch.cat(list(changes.merged(ref, Change((12, 8), 8, products), dtype, block)))
        wanted = W.double()
        for first, B, A in pieces:
            wanted[first : first + len(B)] += 0.5 * B.double() @ A.double()
        assert found.dtype == dtype
        error, ulp = (found.double() - wanted).abs(), torch.finfo(dtype).eps * wanted.abs()
        assert (error <= ulp / 2 + 1e-6 * (dtype != torch.float64) + 1e-14).all()

    @pytest.mark.parametrize("weight", [1.0, 0.25, -1.0])
    def test_what_is_kept_whole_is_gone_towards(self, weight: float, tmp_path: Path) -> None:
        """New rows have nothing to go from: they are put there as they are. A weight of 1 is exact."""
        W, K = torch.randn(5, 4), torch.randn(7, 4)
        toys.save(tmp_path, {"w": W, "k": K})
        refs = open_checkpoint(str(tmp_path)).tensors
        change = Change((7, 4), 4, whole=Whole(refs["k"], weight))
        found = torch.cat(list(changes.merged(refs["w"], change, torch.float32, block=8)))
        wanted = torch.cat([W + weight * (K[:5] - W), K[5:]])
        assert torch.allclose(found, wanted, atol=1e-6)
        assert torch.equal(found[5:], K[5:])
        assert weight != 1 or torch.equal(found, K)

    def test_a_zero_pair_changes_nothing(self, tmp_path: Path) -> None:
        """Not even the sign of a zero, which a sum would."""
        W = torch.tensor([[-0.0, 0.0, 1.0]])
        toys.save(tmp_path, {"w": W})
        ref = open_checkpoint(str(tmp_path)).tensors["w"]
        zero = Product(0, 1, lambda: (torch.zeros(1, 2), torch.ones(2, 3)), 1.0)
        [found] = changes.merged(ref, Change((1, 3), 3, (zero,)), torch.float32)
        assert torch.equal(found.signbit(), W.signbit())

    def test_memory_is_that_of_a_block(self, tmp_path: Path) -> None:
        """Factors of one product at a time are held, and rows of one block."""
        live: list[int] = []
        held = [0]

        class Held:
            def __init__(self) -> None:
                held[0] += 1

            def __del__(self) -> None:
                held[0] -= 1

        def read(witness: list[Held]) -> tuple[Tensor, Tensor]:
            left = torch.ones(4, 1)
            left.witness = Held()  # type: ignore[attr-defined]
            live.append(held[0])
            return left, torch.ones(1, 8)

        toys.save(tmp_path, {"w": torch.zeros(40, 8)})
        ref = open_checkpoint(str(tmp_path)).tensors["w"]
        products = tuple(Product(first, 4, lambda: read([]), 1.0) for first in range(0, 40, 4))
        blocks = list(changes.merged(ref, Change((40, 8), 8, products), torch.float32, block=16))
        assert torch.equal(torch.cat(blocks), torch.ones(40, 8))
        assert max(live) <= 2
        assert len(live) == 10


def test_what_no_adapter_touches_is_the_bases_bit_for_bit(tmp_path: Path) -> None:
    """A NaN with a payload, a negative zero: not what a float would come back as, but the same bytes."""
    tensors = {name: value.bfloat16() for name, value in toys.llama_tensors(layers=1).items()}
    odd = tensors[f"{LAYER}.k_proj.weight"].view(torch.int16)
    odd[0, :3] = torch.tensor([0x7FA1, -32768, 0x7F80], dtype=torch.int16)
    base = toys.save(tmp_path / "base", tensors, shards=3)
    merged(base, adapter(tmp_path / "lora", pair(f"{LAYER}.q_proj", 32, 32)), out=tmp_path / "out")
    before, after = contents(base), contents(tmp_path / "out")
    assert sum(before[name] != after[name] for name in before if name.endswith(".safetensors")) == 1
    for path in base.glob("*.safetensors"):
        for name, value in load_file(path).items():
            same = torch.equal(load_file(tmp_path / "out" / path.name)[name].view(torch.int16), value.view(torch.int16))
            assert same == (name != f"{LAYER}.q_proj.weight")


def test_a_wrappers_prefix_does_not_matter(tmp_path: Path) -> None:
    tensors = toys.llama_tensors(layers=1)
    base = toys.save(tmp_path / "base", tensors)
    bare = toys.save(tmp_path / "bare", {f"language_model.{name}": value for name, value in tensors.items()})
    tuned = toys.save(tmp_path / "tuned", toys.fine_tuned(tensors))
    runs.extract(base, tuned, tmp_path / "lora", rank=4)
    for each in (base, bare):
        merged(each, tmp_path / "lora", out=tmp_path / f"of-{each.name}")
    one, other = tensors_of(tmp_path / "of-base"), tensors_of(tmp_path / "of-bare")
    assert all(torch.equal(other[f"language_model.{name}"], value) for name, value in one.items())
    assert any(not torch.equal(value, tensors[name]) for name, value in one.items())
