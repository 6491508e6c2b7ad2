"""`phlora verify` passes what we write, and catches each way in which an adapter can be another than it claims."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora_pipeline import cli
from phlora_pipeline.errors import NotFoundError, RequestError
from phlora_pipeline.verify import Verification, verify
from tests import runs, toys

Q0, Q1, K0, UP1 = (
    f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.self_attn.k_proj", "1.mlp.up_proj")
)  # fmt: skip
TIED = {**toys.LLAMA, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, fine-tune and adapter: all adapted but k_proj of layer 0 (unchanged) and up_proj of layer 1 (excluded)."""
    root = tmp_path_factory.mktemp("verify")
    base = toys.llama_tensors()
    tuned = toys.fine_tuned(base)
    tuned[f"{K0}.weight"] = base[f"{K0}.weight"]
    toys.save(root / "base", base)
    toys.save(root / "tuned", tuned)
    runs.extract(root / "base", root / "tuned", root / "out", exclude=(f"{UP1}.weight",))
    return root


@pytest.fixture
def zoo(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "zoo"))


def check(zoo: Path) -> Verification:
    return verify(str(zoo / "base"), str(zoo / "tuned"), str(zoo / "out"))


def faults(found: Verification) -> dict[str, str]:
    return {check.module: check.problem for check in found.modules if check.problem}


def edit_weights(zoo: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = zoo / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(zoo: Path, **changes: object) -> None:
    path = zoo / "out" / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dialect", ["portable", "peft"])
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_what_we_write_passes(rank: int, dialect: str, dtype: str, pristine: Path, tmp_path: Path) -> None:
    result = runs.extract(pristine / "base", pristine / "tuned", tmp_path, rank=rank, dialect=dialect, dtype=dtype)
    found = verify(str(pristine / "base"), str(pristine / "tuned"), str(tmp_path))
    assert found.passed, (found.problems, faults(found))
    assert found.written_energy == pytest.approx(result.summary.written_energy, abs=1e-5)
    rows = {row.module: row for row in runs.rows(tmp_path).values()}
    assert {check.module for check in found.modules} == {
        module for module, row in rows.items() if row.status in {"adapted", "zero_filled"}
    }
    for checked in found.modules:
        if checked.written_energy is not None:
            assert checked.written_energy == pytest.approx(rows[checked.module].written_energy, abs=1e-5)


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("change_embedding", [False, True])
def test_tied_embeddings_pass_however_they_are_stored(change_embedding: bool, with_head: bool, tmp_path: Path) -> None:
    """Some checkpoints repeat the tied weight under the output's name; some fine-tunes leave it alone."""
    base = toys.llama_tensors()
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    tuned = toys.fine_tuned(base)
    if not change_embedding:
        tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"]
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    if not with_head:
        del base["lm_head.weight"], tuned["lm_head.weight"]
    folders = toys.save(tmp_path / "base", base, TIED), toys.save(tmp_path / "tuned", tuned, TIED)
    runs.extract(*folders, tmp_path / "out", dialect="peft")
    found = check(tmp_path)
    assert found.passed, (found.problems, faults(found))
    assert ("lm_head" in {checked.module for checked in found.modules}) == change_embedding


def test_half_of_a_tied_delta_is_found(tmp_path: Path) -> None:
    base = toys.llama_tensors()
    del base["lm_head.weight"]
    folders = toys.save(tmp_path / "base", base, TIED), toys.save(tmp_path / "tuned", toys.fine_tuned(base), TIED)
    runs.extract(*folders, tmp_path / "out", dialect="peft")
    edit_weights(tmp_path, lambda tensors: tensors[key("lm_head", "A")].zero_())
    assert "lm_head" in faults(check(tmp_path))


class TestWeights:
    def test_one_flipped_bit(self, zoo: Path) -> None:
        """The highest exponent bit but one of a single factor: the file is as valid as before."""
        path = zoo / "out" / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        entry = json.loads(data[8:start])[key(Q1, "A")]
        data[start + entry["data_offsets"][0] + 3] ^= 0x02
        path.write_bytes(data)
        found = check(zoo)
        assert not found.passed
        assert set(faults(found)) == {Q1}
        assert "the manifest promises" in faults(found)[Q1]

    def test_a_renamed_key(self, zoo: Path) -> None:
        def rename(tensors: dict[str, Tensor]) -> None:
            for side in "AB":
                tensors[key("model.layers.9.self_attn.q_proj", side)] = tensors.pop(key(Q1, side))

        edit_weights(zoo, rename)
        problems = "\n".join(check(zoo).problems)
        assert "model.layers.9.self_attn.q_proj is no module of the base" in problems
        assert f"the config names {Q1}, which has no pair" in problems
        assert f"the manifest says {Q1} is adapted, but the file has no pair" in problems

    def test_a_key_in_the_form_of_another_library(self, zoo: Path) -> None:
        edit_weights(zoo, lambda tensors: tensors.update({"lora_unet_q.alpha": torch.ones(1)}))
        assert any("unexpected key 'lora_unet_q.alpha'" in problem for problem in check(zoo).problems)

    def test_a_removed_key(self, zoo: Path) -> None:
        edit_weights(zoo, lambda tensors: tensors.pop(key(Q1, "B")))
        assert any(f"{Q1} has lora_A without its counterpart" in problem for problem in check(zoo).problems)

    def test_a_removed_zero_pair(self, zoo: Path) -> None:
        edit_weights(zoo, lambda tensors: [tensors.pop(key(K0, side)) for side in "AB"])
        assert any(f"the manifest says {K0} is zero_filled" in problem for problem in check(zoo).problems)

    def test_two_modules_that_changed_places(self, zoo: Path) -> None:
        def swap(tensors: dict[str, Tensor]) -> None:
            for side in "AB":
                one, other = key(Q0, side), key(Q1, side)
                tensors[one], tensors[other] = tensors[other], tensors[one]

        edit_weights(zoo, swap)
        assert set(faults(check(zoo))) == {Q0, Q1}

    @pytest.mark.parametrize("module", [K0, UP1])
    @pytest.mark.parametrize("with_manifest", [True, False])
    def test_a_zero_pair_that_is_none(self, with_manifest: bool, module: str, zoo: Path) -> None:
        """Of an unchanged weight, and of one that was excluded, where any pair at all might still bring it nearer."""

        def fill(tensors: dict[str, Tensor]) -> None:
            for side in "AB":
                tensors[key(module, side)].normal_()

        edit_weights(zoo, fill)
        if not with_manifest:
            (zoo / "out" / "energy.parquet").unlink()
        assert set(faults(check(zoo))) == {module}

    def test_a_helpful_pair_where_the_manifest_says_zero(self, zoo: Path) -> None:
        """It keeps energy, but it is not the adapter that the manifest describes."""
        delta = load_file(zoo / "tuned" / "model.safetensors")[f"{UP1}.weight"] - load_file(zoo / "base" / "model.safetensors")[f"{UP1}.weight"]  # fmt: skip
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)

        def help_out(tensors: dict[str, Tensor]) -> None:
            tensors[key(UP1, "A")] = (S[:8, None] * Vh[:8]).contiguous()
            tensors[key(UP1, "B")] = U[:, :8].contiguous()

        edit_weights(zoo, help_out)
        assert faults(check(zoo)) == {UP1: "the manifest says zero_filled, but the pair is not zero"}

    def test_values_that_are_not_finite(self, zoo: Path) -> None:
        edit_weights(zoo, lambda tensors: tensors[key(Q0, "A")].fill_(float("nan")))
        assert faults(check(zoo)) == {Q0: "its values are not finite"}

    def test_a_transposed_pair(self, zoo: Path) -> None:
        """A square weight hides it from every check of shapes."""

        def turn(tensors: dict[str, Tensor]) -> None:
            A, B = (tensors[key(Q0, side)] for side in "AB")
            tensors[key(Q0, "A")], tensors[key(Q0, "B")] = B.mT.contiguous(), A.mT.contiguous()

        edit_weights(zoo, turn)
        assert set(faults(check(zoo))) == {Q0}


class TestConfig:
    def test_another_scale(self, zoo: Path) -> None:
        edit_config(zoo, lora_alpha=16)
        assert {Q0, Q1} <= set(faults(check(zoo)))

    def test_another_rank_of_the_same_scale(self, zoo: Path) -> None:
        """PEFT makes layers of the config's rank, and cannot load the file into them."""
        edit_config(zoo, r=16, lora_alpha=16)
        problems = check(zoo).problems
        assert any(f"{Q0} has [8, 32] and [32, 8]" in problem and "says rank 16" in problem for problem in problems)

    def test_a_scale_over_the_root_of_the_rank(self, zoo: Path) -> None:
        edit_config(zoo, use_rslora=True)
        assert {Q0, Q1} <= set(faults(check(zoo)))

    def test_a_missing_target(self, zoo: Path) -> None:
        edit_config(zoo, target_modules=["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"])  # fmt: skip
        problems = check(zoo).problems
        assert [problem.split(" ")[0] for problem in problems if "not in target_modules" in problem] == [Q0, Q1]

    def test_one_target_too_many(self, zoo: Path) -> None:
        edit_config(zoo, target_modules=r".*(proj|embed_tokens|lm_head|input_layernorm)")
        *problems, of_servers = check(zoo).problems
        assert len(problems) == 2
        assert all("input_layernorm, which has no pair" in problem for problem in problems)
        assert "a regular expression" in of_servers

    @pytest.mark.parametrize(
        "changes",
        [
            {"r": ...},
            {"r": "8"},
            {"r": 0},
            {"lora_alpha": None},
            {"peft_type": "IA3"},
            {"rank_pattern": {"q_proj": "4"}},
            {"use_dora": True},
        ],
    )
    def test_a_config_that_is_none_is_a_wrong_request(self, changes: dict[str, object], zoo: Path) -> None:
        edit_config(zoo, **changes)
        with pytest.raises(RequestError):
            check(zoo)

    def test_no_adapter_at_all(self, zoo: Path) -> None:
        (zoo / "out" / "adapter_config.json").unlink()
        with pytest.raises(NotFoundError, match="there is no adapter"):
            check(zoo)


class TestCheckpoints:
    @pytest.mark.parametrize("with_manifest", [True, False])
    def test_the_adapter_of_another_fine_tune(self, with_manifest: bool, zoo: Path) -> None:
        other = toys.fine_tuned(toys.llama_tensors(), seed=99)
        toys.save(zoo / "tuned", other)
        if not with_manifest:
            (zoo / "out" / "energy.parquet").unlink()
        found = check(zoo)
        assert not found.passed
        assert {Q0, Q1} <= set(faults(found))

    def test_base_and_fine_tune_exchanged(self, zoo: Path) -> None:
        found = verify(str(zoo / "tuned"), str(zoo / "base"), str(zoo / "out"))
        assert {Q0, Q1} <= set(faults(found))


class TestCommand:
    def verify(self, zoo: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
        urls = ["--base", str(zoo / "base"), "--tuned", str(zoo / "tuned"), "--adapter", str(zoo / "out")]
        monkeypatch.setattr(sys, "argv", ["phlora", "verify", *urls, *flags])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def test_it_says_passed_and_exits_0(
        self, zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.verify(zoo, monkeypatch) == 0
        assert capsys.readouterr().out.startswith("passed: 16 modules")

    def test_it_names_the_fault_and_exits_13(
        self, zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        edit_weights(zoo, lambda tensors: tensors[key(Q0, "A")].mul_(1.5))
        assert self.verify(zoo, monkeypatch, "--json") == 13
        record = json.loads(capsys.readouterr().out)
        assert record["passed"] is False
        assert [module["module"] for module in record["modules"] if module["problem"]] == [Q0]
        assert self.verify(zoo, monkeypatch) == 13
        *_, head, fault, last = capsys.readouterr().out.splitlines()
        assert head.split() == ["module", "energy", "promised", "problem"]
        assert fault.startswith(f"{Q0}  ")  # its whole name, however long
        assert last.startswith("FAILED")
