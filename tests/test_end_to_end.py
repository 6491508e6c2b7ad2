"""`phlora extract` as a whole, on toy checkpoints: what is kept, what is told, and what survives an interruption."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from phlora_pipeline import checkpoint, cli, lowrank, manifest, parts, reading, reducer, storage
from phlora_pipeline.errors import ConflictError, ModelFailedError, RequestError
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.verify import verify
from tests import runs, toys

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def low_rank_fine_tune(base: dict[str, Tensor], *, noise: float = 0.01) -> dict[str, Tensor]:
    """Updates whose spectra fall: most energy in a few directions, as in real fine-tunes."""
    tuned = toys.fine_tuned(base, scale=noise)
    for seed, (name, value) in enumerate(base.items()):
        if value.ndim == 2:
            spectrum = 2.0 ** -torch.arange(min(value.shape), dtype=torch.float64)
            tuned[name] += toys.with_spectrum(*value.shape, spectrum, seed=seed).float()
    return tuned


@pytest.fixture
def falling(tmp_path: Path) -> tuple[Path, Path]:
    base = toys.llama_tensors()
    return toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", low_rank_fine_tune(base))


def deltas(base: Path, tuned: Path) -> dict[str, Tensor]:
    """ΔW of every tensor in float64, read by the reference library."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    return {name: after[name].double() - before[name].double() for name in after}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the `phlora` command."""
    monkeypatch.setattr(sys, "argv", ["phlora", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


class TestSources:
    @pytest.mark.parametrize("shards", [(1, 2), (3, 1), (5, 4)])
    def test_how_a_checkpoint_is_cut_into_shards_changes_no_byte(
        self, shards: tuple[int, int], pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        base = toys.llama_tensors()
        cut = (
            toys.save(tmp_path / "base-cut", base, shards=shards[0]),
            toys.save(tmp_path / "tuned-cut", toys.fine_tuned(base), shards=shards[1]),
        )
        runs.extract(*pair, tmp_path / "whole")
        runs.extract(*cut, tmp_path / "cut")
        whole, pieces = (runs.contents(tmp_path / out) for out in ("whole", "cut"))
        assert whole[WEIGHTS] == pieces[WEIGHTS]
        assert whole[CONFIG] == pieces[CONFIG]

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
    def test_the_same_numbers_in_another_dtype_give_the_same_adapter(self, stored: torch.dtype, tmp_path: Path) -> None:
        """A bf16 base is subtracted in float32: exactly as if it had been stored in float32."""
        short = {name: value.to(stored) for name, value in toys.llama_tensors().items()}
        long = {name: value.float() for name, value in short.items()}
        tuned = toys.save(tmp_path / "tuned", toys.fine_tuned(long), shards=2)
        for name, base in (("short", short), ("long", long)):
            runs.extract(toys.save(tmp_path / f"{name}-base", base), tuned, tmp_path / name)
        assert (tmp_path / "short" / WEIGHTS).read_bytes() == (tmp_path / "long" / WEIGHTS).read_bytes()
        row = runs.rows(tmp_path / "short")["lm_head.weight"]
        assert (row.base_dtype, row.tuned_dtype) == ({"bfloat16": "BF16", "float16": "F16"}[str(stored)[6:]], "F32")

    def test_auto_is_the_fine_tunes_own_16_bits(self, tmp_path: Path) -> None:
        base = toys.llama_tensors()
        tuned = {name: value.bfloat16() for name, value in toys.fine_tuned(base).items()}
        folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned)
        runs.extract(*folders, tmp_path / "out", dtype="auto")
        assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


class TestEnergy:
    def test_preserved_energy_is_that_of_a_float64_reference(self, falling: tuple[Path, Path], tmp_path: Path) -> None:
        """Eq. 5, against numpy's SVD in float64; E_r grows with r, and is not told where it is not known."""
        out = tmp_path / "out"
        runs.extract(*falling, out, rank=8, max_rank=16)
        known = {name: row for name, row in runs.rows(out).items() if row.status == "adapted"}
        changes = deltas(*falling)
        assert set(known) == {name for name, delta in changes.items() if delta.ndim == 2}
        for name, row in known.items():
            squares = np.linalg.svd(changes[name].numpy(), compute_uv=False) ** 2
            reference = squares.cumsum() / squares.sum()
            smallest = min(row.shape)
            assert row.preserved_energy == pytest.approx(reference[7], rel=1e-6)
            assert row.delta_norm == pytest.approx(squares.sum() ** 0.5, rel=1e-7)
            assert np.allclose(row.singular_values, squares[:16] ** 0.5, rtol=1e-5, atol=1e-6)
            assert set(row.energy_at) == set(manifest.ENERGY_RANKS)
            for rank, energy in row.energy_at.items():
                if rank <= 16 or smallest <= 16:
                    assert energy == pytest.approx(reference[min(rank, smallest) - 1], rel=1e-6)
                else:
                    assert energy is None
            told = [energy for energy in row.energy_at.values() if energy is not None]
            assert told == sorted(told)

    @pytest.mark.parametrize("rank", [1, 8, 64])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_written_energy_is_that_of_the_written_bytes(
        self, dtype: str, rank: int, falling: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """1 − ‖ΔW − B̂Â‖²/‖ΔW‖² from the file alone in float64: what it loses, to three digits."""
        out = tmp_path / "out"
        result = runs.extract(*falling, out, rank=rank, dtype=dtype, exclude=("*embed*",))
        changes = deltas(*falling)
        lost, total = 0.0, 0.0
        for name, row in runs.rows(out).items():
            if row.status != "adapted":
                continue
            left = float((changes[name] - runs.written_delta(out, row.module)).square().sum())
            whole = float(changes[name].square().sum())
            assert 1 - row.written_energy == pytest.approx(left / whole, rel=1e-3, abs=1e-11)
            assert row.written_energy <= row.preserved_energy + 1e-6
            lost, total = lost + left, total + whole
        assert 1 - result.summary.written_energy == pytest.approx(lost / total, rel=1e-3, abs=1e-11)

    def test_a_rank_beyond_the_matrix_is_padded_and_exact(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        result = runs.extract(*pair, out, rank=100)
        assert result.written_rank == 128
        changes = deltas(*pair)
        for name, row in runs.rows(out).items():
            if row.status == "adapted" and row.kind != "embedding":
                assert row.rank == min(row.shape)
                assert torch.allclose(runs.written_delta(out, row.module), changes[name], atol=1e-6)
        assert all(128 in value.shape for value in load_file(out / WEIGHTS).values())

    def test_a_rank_16_slice_of_64_agrees_with_rank_16(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        """Truncated SVDs are nested, so parts at max_rank 64 hold every smaller adapter."""
        runs.extract(*pair, tmp_path / "slice", rank=16, max_rank=64)
        runs.extract(*pair, tmp_path / "direct", rank=16)
        sliced, direct = (runs.rows(tmp_path / out) for out in ("slice", "direct"))
        for name, row in direct.items():
            if row.status != "adapted":
                continue
            assert sliced[name].written_energy == pytest.approx(row.written_energy, abs=1e-6)
            if row.kind != "embedding":
                one, other = (runs.written_delta(tmp_path / out, row.module) for out in ("slice", "direct"))
                assert torch.allclose(one, other, atol=1e-5)

    def test_another_rank_needs_no_second_svd_while_parts_are_kept(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        runs.extract(*pair, out, rank=16, max_rank=16, keep_parts=True)
        watcher = runs.Watcher()
        again = runs.extract(*pair, out, rank=4, max_rank=16, dtype="bfloat16", overwrite=True, observer=watcher)
        assert again.read_bytes == 0
        assert all(report.reused for report in watcher.reports)
        runs.extract(*pair, tmp_path / "fresh", rank=4, max_rank=16, dtype="bfloat16")
        assert (out / WEIGHTS).read_bytes() == (tmp_path / "fresh" / WEIGHTS).read_bytes()
        assert not (out / "_parts").exists()


class TestThreshold:
    """`--energy` instead of a rank: every tensor has its own, the adapter the largest of them."""

    def test_each_tensor_has_the_smallest_rank_that_keeps_enough(
        self, falling: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        result = runs.extract(*falling, out, energy=0.9)
        rows = [row for row in runs.rows(out).values() if row.status == "adapted"]
        changes = deltas(*falling)
        for row in rows:
            squares = np.linalg.svd(changes[row.tensor].numpy(), compute_uv=False) ** 2
            shares = squares.cumsum() / squares.sum()
            assert row.rank == 1 + int((shares >= 0.9).argmax())
            assert row.preserved_energy == pytest.approx(shares[row.rank - 1], rel=1e-6)
            assert row.reason == ""
        ranks = {row.rank for row in rows}
        assert len(ranks) > 1
        config = json.loads((out / CONFIG).read_text())
        assert config["r"] == config["lora_alpha"] == result.written_rank
        assert result.written_rank == min(rank for rank in (1, 8, 16, 32) if rank >= max(ranks))
        assert verify(*map(str, falling), str(out)).passed
        assert runs.extract(*falling, out, energy=0.9).outcome == "exists"

    def test_a_cap_that_is_reached_first_is_said(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        runs.extract(*pair, out, energy=0.99, max_rank=5)
        for row in runs.rows(out).values():
            if row.status == "adapted":
                assert row.rank == 5
                assert row.preserved_energy < 0.99
                assert row.reason == "the threshold of 0.99 is not reached at the largest rank allowed, 5"
        assert verify(*map(str, pair), str(out)).passed

    def test_another_threshold_is_another_adapter(self, falling: tuple[Path, Path], tmp_path: Path) -> None:
        runs.extract(*falling, tmp_path / "out", energy=0.5)
        with pytest.raises(ConflictError):
            runs.extract(*falling, tmp_path / "out", energy=0.9)
        assert runs.extract(*falling, tmp_path / "out", energy=0.9, overwrite=True).outcome == "committed"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Large enough for a Krylov basis."""
    root = tmp_path_factory.mktemp("wide")
    base = toys.llama_tensors(layers=1, hidden=176, kv=160, inner=200, vocab=190)
    return toys.save(root / "base", base), toys.save(root / "tuned", low_rank_fine_tune(base))


class TestSolvers:
    def test_all_give_adapters_that_keep_the_same_energy(self, wide: tuple[Path, Path], tmp_path: Path) -> None:
        kept = {}
        for solver in lowrank.SOLVERS:
            out = tmp_path / solver
            kept[solver] = runs.extract(*wide, out, solver=solver).summary.written_energy
            assert verify(*map(str, wide), str(out)).passed
            rows = [row for row in runs.rows(out).values() if row.status == "adapted"]
            for row in rows:
                squares = np.linalg.svd(deltas(*wide)[row.tensor].numpy(), compute_uv=False) ** 2
                optimum = squares[: row.rank].sum() / squares.sum()
                assert 0 < row.certificate <= 1e-3
                assert -1e-6 < optimum - row.preserved_energy <= row.certificate + 1e-7
                if solver != "auto":
                    assert row.solver.startswith(solver) or row.reason.startswith(f"{solver} ")
                    assert row.solver.startswith(solver) or "certificate" in row.reason
            assert json.loads((out / "run.json").read_text())["settings"]["solver"] == solver
        assert all(share == pytest.approx(kept["exact"], abs=1e-4) for share in kept.values())

    def test_a_tighter_tolerance_is_another_extraction_and_is_kept(
        self, wide: tuple[Path, Path], tmp_path: Path
    ) -> None:
        for tolerance in (1e-2, 1e-6):
            out = tmp_path / str(tolerance)
            runs.extract(*wide, out, solver="krylov", tolerance=tolerance)
            rows = [row for row in runs.rows(out).values() if row.status == "adapted"]
            assert max(row.certificate for row in rows) <= max(tolerance, 5e-6)
        versions = [json.loads((tmp_path / out / "run.json").read_text())["version"] for out in ("0.01", "1e-06")]
        assert versions[0] != versions[1]

    def test_a_profile_of_ones_own_takes_its_own_routes(self, wide: tuple[Path, Path], tmp_path: Path) -> None:
        """One on which a full decomposition is next to impossible: `auto` takes Krylov where there is room for a basis."""
        slow = replace(lowrank.PROFILES["cpu"], name="slow", svd_rate=1e3, eigh_rate=1e3, float64_rate=1e3, steps=3)
        (tmp_path / "slow.json").write_text(json.dumps(asdict(slow)))
        out = tmp_path / "out"
        runs.extract(*wide, out, profile=str(tmp_path / "slow.json"), tolerance=0.5)
        assert all(row.solver == "krylov 24" for row in runs.rows(out).values() if row.status == "adapted")

    def test_a_rank_beyond_the_matrix_is_said(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        runs.extract(*pair, tmp_path / "out", rank=20)
        for row in runs.rows(tmp_path / "out").values():
            if row.status == "adapted":
                assert row.reason == ("rank 20 clipped to 16, all there is" if min(row.shape) == 16 else "")


class TestSelection:
    @pytest.mark.parametrize(
        ("choice", "adapted"),
        [
            ({}, ["embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
            ({"targets": "linear"}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
            ({"targets": "paper"}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
            ({"include": ("*.o_proj", "lm_head.weight")}, ["o_proj", "lm_head"]),
            ({"exclude": ("*mlp*", "*embed*", "lm_head")}, ["q_proj", "k_proj", "v_proj", "o_proj"]),
            ({"include": ("*self_attn*",), "exclude": ("*.layers.*.v_proj.weight",)}, ["q_proj", "k_proj", "o_proj"]),
        ],
    )  # fmt: skip
    def test_globs_and_named_sets(
        self, choice: dict[str, object], adapted: list[str], pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        runs.extract(*pair, tmp_path / "out", dialect="peft", **choice)
        rows = runs.rows(tmp_path / "out")
        found = {row.module for row in rows.values() if row.status == "adapted"}
        assert found == {row.module for row in rows.values() if row.module.rpartition(".")[2] in adapted}
        assert sorted(json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]) == sorted(adapted)

    def test_an_excluded_member_of_a_family_has_a_zero_pair_and_its_reason(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        runs.extract(*pair, tmp_path / "out", exclude=("*layers.1.self_attn.v_proj*",))
        row = runs.rows(tmp_path / "out")["model.layers.1.self_attn.v_proj.weight"]
        assert (row.status, row.reason) == ("zero_filled", "excluded by --exclude")
        assert row.delta_norm > 0
        assert not runs.written_delta(tmp_path / "out", row.module).any()

    def test_every_tensor_of_the_fine_tune_has_one_row(self, tmp_path: Path) -> None:
        """Whatever it is: new, integer, three-dimensional, scalar, empty, unchanged, or bare."""
        base = toys.llama_tensors()
        base |= {
            "conv.weight": torch.ones(4, 3, 2),
            "steps": torch.tensor(3),
            "nothing.weight": torch.zeros(0, 4),
            "only.in.base.weight": torch.ones(2, 2),
            "bare": torch.ones(4, 4),
        }
        tuned = toys.fine_tuned({name: value for name, value in base.items() if value.is_floating_point()})
        del tuned["only.in.base.weight"]
        tuned |= {"steps": torch.tensor(4), "new.weight": torch.ones(3, 3)}
        tuned["lm_head.weight"] = base["lm_head.weight"]
        folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned)
        watcher = runs.Watcher()
        result = runs.extract(*folders, tmp_path / "out", observer=watcher)
        rows = runs.rows(tmp_path / "out")
        assert set(rows) == set(tuned)
        status = {name: (rows[name].status, rows[name].reason) for name in rows}
        assert status["lm_head.weight"] == ("unchanged", "")
        assert status["nothing.weight"][0] == "unchanged"
        assert status["new.weight"] == ("skipped", "not in the base")
        for name in ("conv.weight", "steps", "bare", "model.layers.0.input_layernorm.weight"):
            assert status[name][0] == "skipped"
            assert status[name][1]
            assert rows[name].delta_norm > 0
        assert rows["steps"].delta_norm == 1
        assert any("only.in.base.weight" in warning for warning in watcher.warnings)
        changes = {name: float((tuned[name].double() - base[name].double()).square().sum()) for name in base if name in tuned}  # fmt: skip
        own = sum(value for name, value in changes.items() if rows[name].status == "adapted")
        assert result.summary.coverage == pytest.approx(own / sum(changes.values()), rel=1e-6)

    def test_each_column_is_described_in_the_file(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        runs.extract(*pair, tmp_path / "out")
        schema = pq.read_schema(tmp_path / "out" / "energy.parquet")
        assert set(manifest.COLUMNS) | {"model", "base"} == set(schema.names)
        assert all(len(schema.field(name).metadata[b"description"]) > 10 for name in schema.names)


def interrupt_after(tasks: int) -> runs.Watcher:
    class Interrupting(runs.Watcher):
        def task_done(self, report: TaskReport) -> None:
            super().task_done(report)
            if len(self.reports) == tasks:
                raise KeyboardInterrupt

    return Interrupting()


class TestInterruption:
    @pytest.mark.parametrize("tasks", [1, 4, 6])
    def test_an_interrupted_run_goes_on_where_it_was(self, tasks: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
        out, watcher = tmp_path / "out", interrupt_after(tasks)
        with pytest.raises(KeyboardInterrupt):
            runs.extract(*pair, out, observer=watcher)
        assert set(runs.contents(out)) == {
            os.path.relpath(block.part_url, out) for report in watcher.reports for block in report.blocks
        }
        again = runs.Watcher()
        result = runs.extract(*pair, out, observer=again)
        assert [report.task for report in again.reports if report.reused] == [report.task for report in watcher.reports]
        runs.extract(*pair, tmp_path / "undisturbed")
        assert runs.contents(out) == runs.contents(tmp_path / "undisturbed")
        assert result.read_bytes == sum(report.nbytes for report in again.reports if not report.reused)

    @pytest.mark.parametrize("last", reducer.PUBLISHED[:-1])
    def test_a_run_killed_while_it_publishes_is_completed_by_the_next(
        self, last: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever file was the last to be written, no loader sees an adapter; the next run makes it whole, and reads nothing."""
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            kill_after(patch, last)
            with pytest.raises(KeyboardInterrupt):
                runs.extract(*pair, out)
        assert (out / last).exists()
        assert not (out / CONFIG).exists()
        result = runs.extract(*pair, out)
        assert (result.outcome, result.read_bytes) == ("committed", 0)
        runs.extract(*pair, tmp_path / "undisturbed")
        assert runs.contents(out) == runs.contents(tmp_path / "undisturbed")

    def test_weights_that_fail_half_way_leave_nothing(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, keep = tmp_path / "out", parts.read_factor
        read = itertools.count()

        def failing(part: parts.Part, side: str, name: str) -> Tensor:
            if next(read) == 40:
                raise OSError("the cable")
            return keep(part, side, name)

        with monkeypatch.context() as patch:
            patch.setattr(parts, "read_factor", failing)
            with pytest.raises(Exception, match="the cable"):
                runs.extract(*pair, out)
        assert next(read) > 40
        assert {name.split("/")[0] for name in runs.contents(out)} == {"_parts"}
        assert runs.extract(*pair, out).read_bytes == 0

    def test_parts_of_a_run_killed_at_its_very_end_are_removed_by_the_next(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            kill_after(patch, CONFIG)
            with pytest.raises(KeyboardInterrupt):
                runs.extract(*pair, out)
        assert (out / "_parts").exists()
        assert runs.extract(*pair, out).outcome == "exists"
        assert not (out / "_parts").exists()

    def test_a_second_run_finds_the_adapter_and_reads_no_tensor(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        first = runs.extract(*pair, out)
        before = runs.contents(out)
        for module in (reading, parts, checkpoint):
            monkeypatch.setattr(module, "read_tensors", lambda refs: pytest.fail(f"read {refs}"))
        second = runs.extract(*pair, out)
        assert (first.outcome, second.outcome) == ("committed", "exists")
        assert second.read_bytes == 0
        assert second.summary == first.summary
        assert runs.contents(out) == before

    def test_another_adapter_is_not_overwritten_unless_asked(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        runs.extract(*pair, out)
        before = runs.contents(out)
        with pytest.raises(ConflictError, match="already holds another adapter"):
            runs.extract(*pair, out, rank=4)
        assert runs.contents(out) == before
        assert runs.extract(*pair, out, rank=4, overwrite=True).outcome == "committed"
        runs.extract(*pair, tmp_path / "fresh", rank=4)
        assert runs.contents(out) == runs.contents(tmp_path / "fresh")

    def test_identical_checkpoints_leave_a_manifest_and_are_known_again(self, tmp_path: Path) -> None:
        base = toys.llama_tensors()
        folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", base)
        out = tmp_path / "out"
        assert runs.extract(*folders, out).outcome == "nothing_to_adapt"
        assert set(runs.contents(out)) == {"energy.parquet"}
        assert {row.status for row in runs.rows(out).values()} == {"unchanged"}
        assert runs.extract(*folders, out).outcome == "nothing_to_adapt"


def kill_after(patch: pytest.MonkeyPatch, last: str) -> None:
    """The process dies once `last` is written."""
    put_new = storage.put_new

    def killing(url: str, body: bytes | Callable[[], object], **others: int) -> object:
        outcome = put_new(url, body, **others)
        if url.endswith(f"/{last}") and "/_runs/" not in url:
            raise KeyboardInterrupt
        return outcome

    patch.setattr(storage, "put_new", killing)


class TestIsItAFineTune:
    @pytest.fixture
    def strangers(self, tmp_path: Path) -> tuple[Path, Path]:
        base = toys.llama_tensors()
        other = toys.fine_tuned({name: torch.zeros_like(value) for name, value in base.items()}, scale=1)
        return toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", other)

    def test_unrelated_checkpoints_are_refused_and_force_publishes(
        self, strangers: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:  # fmt: skip
        out = tmp_path / "out"
        flags = ["--base", str(strangers[0]), "--tuned", str(strangers[1]), "--out", str(out), "--engine", "local"]
        assert command(monkeypatch, "extract", *flags, "--threads", "1") == 2
        told = capsys.readouterr().err
        assert "not a fine-tune of this base" in told
        assert "--force" in told
        assert not any((out / name).exists() for name in reducer.PUBLISHED)
        assert command(monkeypatch, "extract", *flags, "--threads", "1", "--force") == 0
        assert (out / CONFIG).exists()

    def test_a_far_fine_tune_is_warned_of(self, tmp_path: Path) -> None:
        base = toys.llama_tensors()
        folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", toys.fine_tuned(base, scale=1))
        result = runs.extract(*folders, tmp_path / "out")
        assert result.outcome == "committed"
        assert any("median cosine" in warning and "0.7" in warning for warning in result.warnings)


class TestFailedTensors:
    @pytest.fixture
    def broken(self, tmp_path: Path) -> tuple[Path, Path]:
        """One NaN and one infinity in layer 1's q_proj."""
        base = toys.llama_tensors()
        tuned = toys.fine_tuned(base)
        tuned[self.NAME][3, 5] = float("nan")
        tuned[self.NAME][7, 0] = float("inf")
        return toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned)

    NAME = "model.layers.1.self_attn.q_proj.weight"
    REASON = "2 of 1024 entries of the fine-tune are NaN or infinite, the first at index [3, 5]"

    def test_the_model_is_not_published_and_its_rows_are_with_the_run(
        self, broken: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        with pytest.raises(ModelFailedError, match="no adapter is published") as failed:
            runs.extract(*broken, out)
        assert failed.value.exit_code == 3
        assert self.NAME in failed.value.what
        assert self.REASON in failed.value.what
        assert not any((out / name).exists() for name in reducer.PUBLISHED)
        [run] = (out / "_runs").iterdir()
        found = runs.rows(run)
        assert {row.tensor: row.reason for row in found.values() if row.status == "failed"} == {self.NAME: self.REASON}
        assert len(found) == len(toys.llama_tensors())
        assert json.loads((run / "result.json").read_text())["exit_code"] == 3

    @pytest.mark.parametrize("dialect", ["portable", "peft"])
    def test_allow_partial_publishes_the_others_and_names_it(
        self, dialect: str, broken: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        with pytest.raises(ModelFailedError):
            runs.extract(*broken, out, dialect=dialect)
        watcher = runs.Watcher()
        result = runs.extract(*broken, out, observer=watcher, dialect=dialect, allow_partial=True)
        assert (result.outcome, result.summary.failed) == ("committed", 1)
        tried_again = [report for report in watcher.reports if not report.reused]  # what failed, and nothing else
        assert [report.failed for report in tried_again] == [(self.NAME,)]
        assert self.NAME in (out / "README.md").read_text()
        tensors = load_file(out / WEIGHTS)
        assert all(value.isfinite().all() for value in tensors.values())
        key = f"base_model.model.{self.NAME.removesuffix('.weight')}.lora_B.weight"
        assert (key in tensors) == (dialect == "portable")
        assert verify(str(broken[0]), str(broken[1]), str(out)).passed

    def test_a_nan_in_the_base_is_the_bases(self, tmp_path: Path) -> None:
        base = toys.llama_tensors()
        tuned = toys.fine_tuned(base)
        base["model.layers.0.input_layernorm.weight"][2] = float("nan")
        folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned)
        with pytest.raises(ModelFailedError, match=r"1 of 32 entries of the base are NaN or infinite, .* \[2\]"):
            runs.extract(*folders, tmp_path / "out")

    def test_factors_that_overflow_float16_are_an_error(self, tmp_path: Path) -> None:
        base = toys.llama_tensors()
        tuned = toys.fine_tuned(base)
        tuned["lm_head.weight"][3, 5] += 1e10
        folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned)
        with pytest.raises(RequestError, match=r"factors of lm_head\.weight overflow float16"):
            runs.extract(*folders, tmp_path / "out", dtype="float16", force=True)
        assert runs.extract(*folders, tmp_path / "out", dtype="bfloat16", force=True).outcome == "committed"
