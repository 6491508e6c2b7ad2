"""The benchmark's own parts: its cases are what they say, its measures measure, its tables say what was measured."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jobs.bench import (
    adapters,
    compressing,
    end_to_end,
    figures,
    kernels,
    limit,
    measure,
    pairs,
    peers,
    results,
    table,
    truth,
)
from jobs.bench.__main__ import _parser, main
from jobs.bench.measure import BenchError, Cost
from jobs.bench.settings import QUICK, Bench

ROOT = Path(__file__).parent.parent
SHAPE = (96, 160)
WHEN = {
    "when": "2026-11-22 08:00 UTC",
    "load": 0.1,
    "machine": {"processor": "Abacus", "cores": 2, "memory_gib": 8, "bf16": "beads", "torch": "2.13.0"},
}


def delta_of(spectrum: str) -> torch.Tensor:
    base, tuned = pairs.weight_pair(spectrum, *SHAPE)
    assert base.dtype == tuned.dtype == torch.bfloat16
    return tuned.double() - base.double()


def cost(wall: float) -> dict[str, float]:
    return {"wall": wall, "processor": wall, "peak_mib": 100.0, "runs": 3}


class TestPairs:
    @pytest.mark.parametrize("spectrum", [name for name in pairs.SPECTRA if name not in {"rank-16", "rounding"}])
    def test_a_pair_has_the_singular_values_of_its_name_up_to_bf16(self, spectrum: str) -> None:
        found = torch.linalg.svdvals(delta_of(spectrum))
        wanted = pairs.singular_values(spectrum, len(found))
        torch.testing.assert_close(found / found.norm(), wanted / wanted.norm(), rtol=0.02, atol=2e-3)

    def test_the_chosen_update_is_exact_before_it_is_rounded(self) -> None:
        wanted = pairs.singular_values("power-0.6", 50)
        found = torch.linalg.svdvals(pairs.with_spectrum(wanted, 50, 70, 0.002, torch.Generator()).double())
        torch.testing.assert_close(found / found[0], wanted, rtol=1e-5, atol=0)

    def test_an_update_is_dense_and_has_the_size_that_was_asked_for(self) -> None:
        delta = delta_of("power-1.0")
        assert float(delta.square().mean().sqrt()) == pytest.approx(pairs.UPDATE_RMS, rel=0.01)
        rows = delta.square().sum(1)
        assert float(rows.max() / rows.min()) < 100

    def test_the_exactly_low_rank_update_survives_bf16(self) -> None:
        found = torch.linalg.svdvals(delta_of("rank-16"))
        assert int((found > 1e-12 * found[0]).sum()) == pairs.LOW_RANK

    def test_the_lost_update_is_mostly_rounding(self) -> None:
        found = torch.linalg.svdvals(delta_of("rounding")).square()
        assert float(found[: pairs.LOW_RANK].sum() / found.sum()) < 0.7

    def test_a_pair_is_the_same_every_time_and_another_seed_another_pair(self) -> None:
        first, again = pairs.weight_pair("power-0.4", *SHAPE), pairs.weight_pair("power-0.4", *SHAPE)
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[1], pairs.weight_pair("power-0.4", *SHAPE, seed=1)[1])

    def test_an_unknown_spectrum_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"'steep'; known: power-0\.35"):
            pairs.weight_pair("steep", *SHAPE)

    def test_a_checkpoint_has_every_tensor_of_its_config_and_is_made_once(self, tmp_path: Path) -> None:
        base, tuned = pairs.llama_pair(tmp_path, 1, 64, 176, 96)
        stamp = (tuned / "model.safetensors").stat().st_mtime_ns
        assert pairs.llama_pair(tmp_path, 1, 64, 176, 96) == (base, tuned)
        assert (tuned / "model.safetensors").stat().st_mtime_ns == stamp
        config = json.loads((base / "config.json").read_text())
        rows = config["num_key_value_heads"] * config["head_dim"]
        assert pairs.llama_shapes(1, 64, 176, 96)["model.layers.0.self_attn.k_proj.weight"] == (rows, 64)
        assert config["num_attention_heads"] * config["head_dim"] == 64


class TestTruth:
    def test_captured_energy_of_a_case_done_by_hand(self) -> None:
        """ΔW = diag(3, 4): keeping the 4 keeps 16 of 25; keeping it at half strength leaves 9 + 4."""
        base, tuned = torch.zeros(2, 2).bfloat16(), torch.diag(torch.tensor([3.0, 4.0])).bfloat16()
        A, B = torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0], [1.0]])
        assert truth.captured(base, tuned, A, B) == pytest.approx(16 / 25)
        assert truth.captured(base, tuned, A / 2, B) == pytest.approx(12 / 25)
        assert truth.captured(base, tuned, -A, B) < 0

    def test_many_rows_are_summed_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        base, tuned = pairs.weight_pair("power-0.4", *SHAPE)
        A, B = peers.full_svd(base, tuned, 8)
        whole = truth.captured(base, tuned, A, B)
        monkeypatch.setattr(truth, "_ROWS", 7)
        assert truth.captured(base, tuned, A, B) == pytest.approx(whole, abs=1e-12)

    @pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
    def test_the_optimum_is_what_the_singular_values_say(self, shape: tuple[int, int]) -> None:
        base, tuned = pairs.weight_pair("clustered", *shape)
        squares = torch.linalg.svdvals(tuned.double() - base.double()).square()
        found = truth.optimal(base, tuned, [1, 16, 40, 512])
        assert found[16] == pytest.approx(float(squares[:16].sum() / squares.sum()), abs=1e-12)
        assert found[40] == found[512] == pytest.approx(1)

    def test_known_optima_are_kept_and_completed(self, tmp_path: Path) -> None:
        base, tuned = pairs.weight_pair("power-0.4", 40, 70)
        first = truth.known_optimal(tmp_path, "power-0.4", base, tuned, [8])
        more = truth.known_optimal(tmp_path, "power-0.4", base, tuned, [8, 16])
        nothing = torch.zeros(40, 70)
        assert truth.known_optimal(tmp_path, "power-0.4", nothing, nothing, [8, 16]) == more
        assert more[8] == first[8] < more[16]


class TestPeers:
    @pytest.mark.parametrize("name", [peers.BASELINE, *peers.METHODS])
    def test_every_library_finds_an_exactly_low_rank_update(self, name: str) -> None:
        methods = {peers.BASELINE: peers.full_svd, **peers.available()}
        if name not in methods:
            pytest.skip(f"{name}: its library comes with the extra `bench`")
        base, tuned = pairs.weight_pair("rank-16", 64, 48)
        A, B = methods[name](base, tuned, 16)
        assert (A.shape, B.shape) == ((16, 48), (64, 16))
        assert truth.captured(base, tuned, A, B) == pytest.approx(1, abs=1e-5)

    def test_arpack_is_not_asked_for_all_singular_values(self) -> None:
        assert not peers.takes("scipy svds", (32, 64), 32)
        assert peers.takes("scipy svds", (32, 64), 31)
        assert not peers.takes("torch.svd_lowrank, niter=2", (32, 64), 33)


@pytest.mark.parametrize("solver", kernels.OURS)
def test_ours_is_called_with_every_solver(solver: str) -> None:
    base, tuned = pairs.weight_pair("power-1.0", 160, 120)
    A, B, certificate, route = kernels.Ours(base, tuned, "w", 8, solver)()  # type: ignore[arg-type]
    best = truth.optimal(base, tuned, [8])[8]
    assert (A.shape, B.shape) == ((8, 120), (160, 8))
    assert best - truth.captured(base, tuned, A, B) <= max(certificate, 1e-6)
    assert route


class TestMeasure:
    def test_a_child_is_measured_alone(self) -> None:
        """Its peak is its own, though the process that asks for it is a hundred times as large."""
        ballast = torch.ones(1 << 27, dtype=torch.int8)
        found, said = measure.run_command([sys.executable, "-S", "-c", "print(sum(range(3_000_000)))"])
        assert int(said) == sum(range(3_000_000))
        assert found.wall > 0
        assert found.processor > 0
        assert 1 < found.peak_mib < 100 < len(ballast) >> 20

    def test_memory_of_a_child_is_seen(self) -> None:
        small, _ = measure.run_command([sys.executable, "-S", "-c", "pass"])
        large, _ = measure.run_command([sys.executable, "-S", "-c", "x = bytearray(64 << 20)"])
        assert 60 < large.peak_mib - small.peak_mib < 70

    def test_a_child_that_fails_is_an_error_with_its_last_words(self) -> None:
        with pytest.raises(BenchError, match=r"exit code 3: .*no luck"):
            measure.run_command([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"])
        with pytest.raises(BenchError, match=r"exit code 137"):
            measure.run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])

    def test_last_words_tell_no_paths(self, tmp_path: Path) -> None:
        with pytest.raises(BenchError) as caught:
            measure.run_command([sys.executable, "-c", f"raise SystemExit('no such file: {tmp_path}/x')"])
        assert str(tmp_path) not in str(caught.value)

    def test_a_child_gets_the_threads_it_is_given_and_may_keep_byte_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        assert measure.environment(2)["OMP_NUM_THREADS"] == "2"
        assert not {"OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"} & set(measure.environment(None))

    def test_medians(self) -> None:
        costs = [Cost(3, 1, 10), Cost(1, 5, 30), Cost(2, 3, 20)]
        assert measure.median_cost(costs) == Cost(2, 3, 20, runs=3)

    def test_a_short_call_is_timed_often_and_always_warmed_up(self) -> None:
        calls: list[int] = []
        found = measure.timed(lambda: calls.append(1))
        assert (found.runs, len(calls)) == (25, 26)
        assert found.fastest <= found.seconds

    def test_the_machine_is_told_without_its_name(self) -> None:
        sentence = measure.machine().sentence()
        assert "cores" in sentence
        assert torch.__version__ in sentence


def test_reading_rate_and_dropping_pages_read_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * limit._BUFFER + 17))
    assert limit.reading_rate([path], cold=False) > 0
    assert limit.reading_rate([path], cold=True) > 0


def test_the_algorithm_needs_more_work_for_more_rank_and_less_than_a_full_svd() -> None:
    small, large = (limit.algorithm_work(2048, 2048, rank) for rank in (8, 32))
    assert 0 < small.low + small.precise < large.low + large.precise < 26.0 * 2048**3


class TestAdapters:
    def test_factors_come_back_in_the_checkpoints_orientation(self, tmp_path: Path) -> None:
        at = "base_model.model.model"
        save_file(
            {
                f"{at}.q_proj.lora_A.weight": torch.ones(2, 5),
                f"{at}.q_proj.lora_B.weight": torch.ones(3, 2),
                f"{at}.q_proj.lora_B.bias": torch.ones(3),
                f"{at}.embed_tokens.lora_embedding_A": torch.ones(2, 11),
                f"{at}.embed_tokens.lora_embedding_B": torch.ones(7, 2),
            },
            tmp_path / "adapter_model.safetensors",
        )
        found = adapters.adapter_factors(tmp_path)
        assert {name: (tuple(A.shape), tuple(B.shape)) for name, (A, B) in found.items()} == {
            "model.q_proj": ((2, 5), (3, 2)),
            "model.embed_tokens": ((2, 7), (11, 2)),
        }

    def test_energies_name_the_tensor_where_ours_is_worst(self, tmp_path: Path) -> None:
        base, tuned = pairs.llama_pair(tmp_path, 1, 64, 176, 96)
        names = [name for name in pairs.llama_shapes(1, 64, 176, 96) if "_proj" in name]
        shapes = pairs.llama_shapes(1, 64, 176, 96)
        for tool, ranks in (("ours", {names[0]: 4}), ("mergekit", {names[1]: 4})):
            factors = {}
            for seed, name in enumerate(shapes):
                if name in names:
                    before, after = pairs.weight_pair("power-0.4", *shapes[name], seed)  # type: ignore[misc]
                    A, B = peers.full_svd(before, after, ranks.get(name, 8))
                    module = f"base_model.model.{name.removesuffix('.weight')}"
                    factors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
            if tool == "mergekit":
                factors.pop(next(iter(factors)))  # one half of a pair that ours has: the other half is alone
                factors.pop(next(iter(factors)))
            (tmp_path / tool).mkdir()
            save_file(
                {key: value.contiguous() for key, value in factors.items()},
                tmp_path / tool / "adapter_model.safetensors",
            )
        found = adapters.energies(base, tuned, {tool: tmp_path / tool for tool in ("ours", "mergekit")})
        assert found["tensors"] == len(names) - 1
        assert found["not_in_both"] == [names[0].removesuffix(".weight")]
        assert found["captured"]["ours"] > found["captured"]["mergekit"]
        assert found["worst_difference"] == pytest.approx(0, abs=1e-9)


class TestResults:
    def test_a_repeated_row_replaces_its_own_and_no_other(self, tmp_path: Path) -> None:
        path = tmp_path / "benchmarks.json"
        results.save(path, "limit", {"a": {"ratio": 1}, "b": {"ratio": 2}})
        results.save(path, "kernels", {"8x8": {}})
        results.save(path, "limit", {"b": {"ratio": 3}})
        assert results.read(path) == {"limit": {"a": {"ratio": 1}, "b": {"ratio": 3}}, "kernels": {"8x8": {}}}
        assert [entry.name for entry in tmp_path.iterdir()] == ["benchmarks.json"]

    def test_nothing_is_there_before_the_first_row(self, tmp_path: Path) -> None:
        assert results.read(tmp_path / "benchmarks.json") == {}


def kernel_row(**changed: object) -> dict[str, object]:
    row = {
        "spectrum": "power-0.4", "rank": 32, "method": "auto", "seconds": 0.2, "fastest": 0.19, "runs": 5, "captured": 0.25,
        "optimal": 0.2500025, "captured_to_optimal": 0.99999, "loss": 2.5e-6, "certificate": 3e-6, "route": "krylov 160",
    }  # fmt: skip
    return row | changed


RESULTS = {
    "end-to-end": {
        "matrices": {
            **WHEN, "rank": 32, "ours": cost(4.0), "ours_start_up": cost(2.0), "mergekit": {**cost(88.0), "threads": 2}, "mergekit_start_up": cost(8.0),
            "energy": {"tensors": 28, "not_in_both": [], "captured": {"ours": 0.3, "mergekit": 0.30001}, "worst_difference": -2e-5, "worst_tensor": "q_proj"},
        },
        "MiniLM": {**WHEN, "skipped": "not prepared"},
    },
    "limit": {"from the page cache": {**WHEN, "rank": 32, "read_bytes": 1.2e9, "ours": cost(4.0), "start_up": cost(2.0), "reading_seconds": 0.2, "products_seconds": 1.0, "limit_seconds": 1.0, "ratio": 2.0}},
    "scaling": {f"rank {rank}": {**WHEN, "series": "rank", "value": rank, "ours": cost(rank), "start_up": cost(1.0)} for rank in (16, 8)},
    "kernels": {
        "4096x4096": {
            **WHEN, "threads": 2, "baseline": {"method": "torch.linalg.svd", "threads": 2, "seconds": 12.4, "fastest": 12.0, "runs": 5},
            "exact": {"seconds": 13.0, "fastest": 13.0, "runs": 5},
            "rows": [
                kernel_row(), kernel_row(spectrum="flat", seconds=0.4, fastest=0.39, captured_to_optimal=0.9, certificate=2e-4),
                {key: value for key, value in kernel_row(method="scipy svds", seconds=6.2).items() if key not in {"route", "certificate"}},
            ],
        }
    },
}  # fmt: skip


class TestTable:
    def test_all_that_was_measured_is_shown(self) -> None:
        shown = table.rendered(RESULTS)
        for part in (
            "2026-11-22, on Abacus, 2 cores, 8 GiB, bf16 products by beads; torch 2.13.0",
            "| matrices, r = 32 | `phlora extract`, median of 3 | 4.00 s | 2.00 s | 4.00 s | 100 MiB | 30.00 % | 22× faster | 40× faster | 1.00 of mergekit's |",
            "ours is at worst -2.0e-05 of a tensor's ‖ΔW‖² from mergekit's (q_proj)",
            "- MiniLM: not prepared",
            "| from the page cache, r = 32, 1.20 GB | 4.00 s | 2.00 s | 200 ms | 1.00 s | 1.00 s | 2.00 |",
            "| rank | 8 | 16 |\n|---|---|---|\n| wall | 8.00 s | 16.0 s |",
            "| 4096×4096 | 32 | 12.4 s | 200 ms | 62× | 25.00 % | 1 − 1.0e-05 | 3.0e-06 | krylov 160 | 0.9000 (flat) | 31× (flat) | 0.03 |",
            "| 4096×4096 | flat | 32 | 400 ms | 31× | 25.00 % | 0.9000 | 2.0e-04 | krylov 160 |",
            "| 4096×4096 | 32 | scipy svds | 6.20 s (of 5) | 2.0× | 25.00 % | 1 − 1.0e-05 |",
        ):
            assert part in shown

    def test_the_headline_is_the_beginning_of_it(self) -> None:
        shown = table.headline(RESULTS)
        assert all(title in shown for title in ("**End to end**", "**Distance to the limit**", "**Kernels**"))
        assert not any(part in shown for part in ("**How cost grows**", "scipy svds", "Every spectrum"))
        assert set(shown.split("\n\n")) < set(table.rendered(RESULTS).split("\n\n"))

    @pytest.mark.parametrize("section", RESULTS)
    def test_a_section_stands_alone(self, section: str) -> None:
        assert "| " in table.rendered({section: RESULTS[section]})

    def test_exact_timed_in_the_same_cell_is_what_counts(self) -> None:
        rows = [kernel_row(exact_here={"fastest": 0.1, "seconds": 0.1, "runs": 5})]
        shown = table.rendered({"kernels": {"8x8": {**RESULTS["kernels"]["4096x4096"], "rows": rows}}})
        assert "| 1.90 |" in shown

    def test_a_peer_that_refuses_a_pair_is_said_to(self) -> None:
        row = RESULTS["end-to-end"]["matrices"]
        refused = {
            **row,
            "mergekit": {"skipped": "no such architecture"},
            "energy": {**row["energy"], "captured": {"ours": 0.3}},
        }
        assert "- BERT: no such architecture" in table.rendered({"end-to-end": {"BERT": refused}})

    def test_a_gpus_kernels_have_a_table_of_their_own(self) -> None:
        shape = {**RESULTS["kernels"]["4096x4096"], "gpu": "NVIDIA H100"}
        shown = table.rendered({"kernels": RESULTS["kernels"], "kernels-cuda": {"8x8": shape}})
        assert shown.count("**Kernels") == 2
        assert "**Kernels on a GPU** (NVIDIA H100, torch " in shown
        assert shown.count("Measured by") == 1
        assert "NVIDIA" not in shown.partition("**Kernels")[0]
        assert "on a GPU" not in table.headline({"kernels-cuda": {"8x8": shape}})

    def test_nothing_measured_gives_nothing(self) -> None:
        assert table.rendered({}) == ""

    def test_insertion_keeps_the_rest_and_can_be_repeated(self) -> None:
        readme = f"# Title\n\n{table.START}\nold\n{table.END}\n\nrest\n"
        once = table.inserted(readme, table.rendered(RESULTS))
        assert once.startswith("# Title\n")
        assert once.endswith(f"{table.END}\n\nrest\n")
        assert "old" not in once
        assert table.inserted(once, table.rendered(RESULTS)) == once

    @pytest.mark.parametrize("readme", ["", table.START, table.END, f"{table.END} {table.START}"])
    def test_a_readme_without_the_place_is_refused(self, readme: str) -> None:
        with pytest.raises(ValueError, match="no place for the table"):
            table.inserted(readme, "new")


@pytest.mark.parametrize("module", [end_to_end, measure, figures, pairs, results, table])
def test_the_examples_in_the_docstrings_hold(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_both_tools_are_called_evenly() -> None:
    assert end_to_end.in_turns(ours=2, mergekit=0) == ["ours", "ours"]
    assert end_to_end.in_turns(ours=1, mergekit=2).count("mergekit") == 2


@pytest.mark.slow
def test_the_quick_benchmark_runs_as_a_process_and_fills_the_readme(tmp_path: Path) -> None:
    readme, tables = tmp_path / "README.md", tmp_path / "tables.md"
    for page in (readme, tables):
        page.write_text(f"before\n{table.START}\n{table.END}\nafter\n")
    # What is about zoos runs as a process in test_bench_zoo.
    sections = ["kernels", "end-to-end", "compress", "limit", "scaling", "ranges"]
    assert set(_parser().parse_args([]).only) == {*sections, "planning", "dispatch", "night"}
    command = [
        sys.executable,
        "-m",
        "jobs.bench",
        "--quick",
        "--no-mergekit",
        "--only",
        ",".join(sections),
        "--dir",
        str(tmp_path / "scratch"),
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "b.json"), "--readme", str(readme), "--tables", str(tables)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = results.read(tmp_path / "b.json")
    assert set(found) == set(sections)
    assert set(found["kernels"]) == {f"{d}x{k}" for d, k in QUICK.shapes}
    for shape in found["kernels"].values():
        assert {row["rank"] for row in shape["rows"]} == set(QUICK.ranks)
        assert all(0 < row["captured"] <= row["optimal"] + 1e-6 for row in shape["rows"])
    assert 0 < found["end-to-end"]["matrices"]["energy"]["captured"]["ours"] < 1
    assert str(tmp_path) not in (tmp_path / "b.json").read_text()
    for page in (readme, tables):
        assert "**Kernels**" in page.read_text()
        assert page.read_text().endswith("after\n")
    assert ("**How cost grows**" in readme.read_text(), "**How cost grows**" in tables.read_text()) == (False, True)


def test_only_the_kernels_are_measured_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs.bench", "--device", "cuda"])
    assert main() == 2
    assert "--device cuda is for --only kernels" in capsys.readouterr().err


@pytest.mark.parametrize("others", [False, True])
def test_the_kernels_alone_or_beside_others(tmp_path: Path, *, others: bool) -> None:
    sizes = replace(QUICK, shapes=((96, 96),), ranks=(16,), spectra=("power-0.4",))
    saved: dict[str, Any] = {}
    kernels.run(Bench(tmp_path, sizes, peers=False, others=others, say=lambda _: None, save=saved.update))
    found = {row["method"] for row in saved["96x96"]["rows"]}
    assert found >= {"auto", "torch.svd_lowrank, niter=2"} if others else found == {"auto"}


def test_compressing_is_timed_beside_the_full_svd_and_loses_nothing(tmp_path: Path) -> None:
    A, B = compressing.factors(40, 30, 8)
    wanted = torch.arange(1, 9).double() ** -compressing.DECAY
    assert torch.allclose(torch.linalg.svdvals((B @ A).double())[:8], wanted, rtol=1e-4)
    assert not torch.allclose(A @ A.mT, torch.diag(torch.diag(A @ A.mT)), atol=1e-2)
    row = compressing.measured(40, 30, 8, 3)
    assert abs(row["loss"]) < 1e-6
    assert row["captured"] == pytest.approx(float(wanted[:3].square().sum() / wanted.square().sum()), abs=1e-4)
    assert row["faster"] == row["svd"]["seconds"] / row["ours"]["seconds"] > 0
    shown = table.rendered({"compress": {"40x30 8→3": {**row, **WHEN, "faster": 61.7}}})
    assert "| 40×30 | 8→3 | " in shown
    assert "| 62× | " in shown


def test_an_unknown_section_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.bench", "--only", "speed"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "unknown: speed; known: kernels, end-to-end, compress, limit, scaling" in done.stderr
