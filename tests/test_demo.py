"""The demo's pure parts: packages, corpus, scoring, the numbering network, the table. No network, no downloads."""

from __future__ import annotations

import doctest
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from jobs.demo import antibody, command, corpus, folders, numbering, packages, pairs, table, tagging
from jobs.demo.errors import DemoError
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.summary import summarize

PACKAGE = packages.Package("wheel", "thing", "1.0", "thing-1.0.whl", "")


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


ARCHIVES: list[Callable[..., Path]] = [zipped, tarred]


@pytest.mark.parametrize("module", [antibody, corpus, numbering, pairs, table, tagging])
def test_examples_in_docstrings_hold(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# packages


@pytest.mark.parametrize("archive", ARCHIVES)
def test_unpack_takes_the_wanted_members_and_nothing_else(archive, tmp_path: Path) -> None:
    path = archive(
        tmp_path / "a", {"pkg/model/w.bin": b"weights", "pkg/model/deep/c.json": b"{}", "pkg/code.py": b"evil()"}
    )
    into = packages.unpack(path, ["pkg/model/*"], tmp_path / "out")
    assert {str(p.relative_to(into)): p.read_bytes() for p in into.rglob("*") if p.is_file()} == {
        "pkg/model/w.bin": b"weights",
        "pkg/model/deep/c.json": b"{}",
    }


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize(
    "name", ["../../escaped.txt", "/escaped.txt", "a/../../escaped.txt", "C:/escaped.txt", "..\\escaped.txt"]
)
def test_unpack_refuses_members_that_would_leave_the_folder(archive, name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = archive(tmp_path / "in" / "a", {"good.txt": b"1", name: b"2"})
    with pytest.raises(DemoError, match="outside its folder"):
        packages.unpack(path, ["*"], tmp_path / "in" / "out")
    # Nothing half unpacked is left for the next call to re-use.
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a"]


def test_unpack_refuses_a_link_even_inside_the_archive(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a", {"w.bin": b"1"}, links={"link.bin": "w.bin"})
    with pytest.raises(DemoError, match=r"'link.bin' is not a regular file"):
        packages.unpack(path, ["*.bin"], tmp_path / "out")


@pytest.mark.parametrize("archive", ARCHIVES)
def test_unpack_refuses_a_member_above_the_limit(archive, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packages, "MEMBER_LIMIT", 3)
    with pytest.raises(DemoError, match="has 4 bytes, more than 3"):
        packages.unpack(archive(tmp_path / "a", {"w.bin": b"1234"}), ["w.bin"], tmp_path / "out")


def test_unpack_names_what_an_archive_lacks(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"holds nothing named absent/\*"):
        packages.unpack(zipped(tmp_path / "a", {"w.bin": b"1"}), ["w.bin", "absent/*"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unpack_reuses_a_complete_folder(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a", {"w.bin": b"1"})
    packages.unpack(path, ["w.bin"], tmp_path / "out")
    path.unlink()
    assert (packages.unpack(path, ["w.bin"], tmp_path / "out") / "w.bin").read_bytes() == b"1"


def client_that_brings(content: bytes) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Stands for pip: puts a file where `--dest` says."""

    def run(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(arguments[arguments.index("--dest") + 1]) / PACKAGE.filename).write_bytes(content)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    return run


def pinned(content: bytes, tmp_path: Path) -> packages.Package:
    (tmp_path / "pin").write_bytes(content)
    return replace(PACKAGE, sha256=packages._sha256(tmp_path / "pin"))


def test_fetch_keeps_a_file_of_the_pinned_content_and_then_asks_no_more(tmp_path: Path, monkeypatch) -> None:
    package = pinned(b"right", tmp_path)
    monkeypatch.setattr(subprocess, "run", client_that_brings(b"right"))
    assert packages.fetch(package, tmp_path / "d").read_bytes() == b"right"
    monkeypatch.setattr(subprocess, "run", None)
    assert packages.fetch(package, tmp_path / "d").read_bytes() == b"right"


def test_fetch_refuses_another_content_and_keeps_nothing(tmp_path: Path, monkeypatch) -> None:
    package = pinned(b"right", tmp_path)
    monkeypatch.setattr(subprocess, "run", client_that_brings(b"wrong"))
    with pytest.raises(DemoError, match=f"expected {package.sha256}"):
        packages.fetch(package, tmp_path / "d")
    assert list((tmp_path / "d").iterdir()) == []


def test_fetch_replaces_a_damaged_file(tmp_path: Path, monkeypatch) -> None:
    package = pinned(b"right", tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / package.filename).write_bytes(b"rig")
    monkeypatch.setattr(subprocess, "run", client_that_brings(b"right"))
    assert packages.fetch(package, tmp_path / "d").read_bytes() == b"right"


def test_a_failed_download_names_the_package_the_reason_and_a_remedy(tmp_path: Path, monkeypatch) -> None:
    stderr = "WARNING: chatter\nERROR: Could not find a version\nERROR: No matching distribution\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", stderr))
    with pytest.raises(DemoError) as caught:
        packages.fetch(PACKAGE, tmp_path)
    assert "thing 1.0 (PyPI)" in caught.value.what
    assert "No matching distribution" in caught.value.what
    assert "chatter" not in caught.value.what
    assert "network" in caught.value.remedy


def test_without_npm_the_message_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DemoError, match="npm is not on PATH") as caught:
        packages.fetch(replace(PACKAGE, source="npm"), tmp_path)
    assert "install Node.js" in caught.value.remedy


def test_pip_knows_the_hash_before_it_looks_into_a_source_archive(tmp_path: Path) -> None:
    arguments = packages._command(replace(PACKAGE, source="sdist", sha256="ab" * 32), tmp_path)
    assert "--require-hashes" in arguments
    assert (tmp_path / "requirements.txt").read_text() == f"thing==1.0 --hash=sha256:{'ab' * 32}\n"


def test_a_folder_written_aside_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), folders.written_aside(tmp_path / "out") as aside:  # noqa: PT012
        (aside / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with folders.written_aside(tmp_path / "out") as aside:
        (aside / "whole").touch()
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "whole"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


# corpus


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [
        ("at", "DET"), ("np$-tl", "NOUN"), ("jjt", "ADJ"), ("vbd-hl", "VERB"), ("bedz*", "VERB"), ("md*", "VERB"), ("*", "ADV"),
        ("*-hl", "ADV"), ("pps+bez", "PRON"), ("wdt+bez", "DET"), ("wrb", "ADV"), ("wps", "PRON"), ("fw-nn-tl", "X"), ("nil", "X"),
        ("to", "PRT"), ("rp", "PRT"), ("rbr", "ADV"), ("cs", "ADP"), ("od", "NUM"), ("---hl", "."), (",-tl", "."), ("(", "."),
    ],
)  # fmt: skip
def test_brown_tags_have_their_universal_class(tag: str, wanted: str) -> None:
    assert corpus.universal(tag) == wanted


def test_parse_reads_a_sentence_a_line_and_slashes_inside_words() -> None:
    (first, second) = corpus.parse("\n\n\tThe/at and/or/cc 1/2/cd\n\n\n\tStop/vb ./.\n")
    assert first == corpus.Sentence(("The", "and/or", "1/2"), tuple(map(corpus.TAGS.index, ("DET", "CONJ", "NUM"))))
    assert second.words == ("Stop", ".")


@pytest.mark.parametrize("token", ["word", "/at", "word/"])
def test_parse_names_the_document_and_the_token_that_is_not_tagged(token: str) -> None:
    with pytest.raises(DemoError, match=f"ca01: '{token}' is not word/tag"):
        corpus.parse(f"The/at {token}", "ca01")


def test_no_document_is_on_both_sides(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"c{number:02}").write_text(f"document{number}/nn\n" * 3)
    read = corpus.read_corpus(tmp_path)
    train, held_out = ({sentence.words for sentence in side} for side in (read.train, read.held_out))
    assert (len(train), len(held_out)) == (18, 2)
    assert not train & held_out


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="no documents"):
        corpus.read_corpus(tmp_path)


# tagging


class Words(dict):
    """What a tokenizer gives back, with one piece per word between two special tokens."""

    def __init__(self, texts: list[list[str]]) -> None:
        self.rows = [[None, *range(len(words)), None] for words in texts]
        width = max(map(len, self.rows))
        self.rows = [row + [None] * (width - len(row)) for row in self.rows]
        ids = [[1, *(2 + sum(map(ord, word)) % 30 for word in words), 1] for words in texts]
        super().__init__(input_ids=torch.tensor([row + [0] * (width - len(row)) for row in ids]))

    def word_ids(self, row: int) -> list[int | None]:
        return self.rows[row]


def tokenizer(texts: list[list[str]], **_: object) -> Words:
    return Words(texts)


class Tagger(nn.Module):
    """The smallest model of the shape that tagging trains: a body and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_model = Body()
        self.classifier = nn.Linear(8, len(corpus.TAGS))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(self.base_model(input_ids).last_hidden_state))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.dropout(self.embedding(input_ids)))


def sentences(number: int) -> list[corpus.Sentence]:
    vocabulary = {"the": 4, "dog": 5, "cat": 5, "runs": 9, "red": 0, ".": 10}
    texts = ["the dog runs .", "the red cat runs .", "cat .", "red dog ."]
    found = [tuple(texts[i % len(texts)].split()) for i in range(number)]
    return [corpus.Sentence(words, tuple(vocabulary[word] for word in words)) for words in found]


def test_only_the_first_piece_of_each_word_is_asked() -> None:
    assert tagging.labels([None, 0, 1, 1, 1, 2, None, None], (3, 4, 5)) == [-100, 3, 4, -100, -100, 5, -100, -100]


def test_correct_counts_asked_tokens_only() -> None:
    logits = torch.eye(3)[torch.tensor([[0, 1, 2], [1, 1, 1]])]
    wanted = torch.tensor([[0, 2, -100], [1, -100, -100]])
    assert tagging.correct(logits, wanted) == (2, 3)


def test_batches_hold_every_sentence_once_in_order_of_length() -> None:
    given = sentences(10)
    made = tagging.batches(given, 4)
    assert [len(batch) for batch in made] == [4, 4, 2]
    flat = [sentence for batch in made for sentence in batch]
    assert sorted(map(id, flat)) == sorted(map(id, given))
    assert [len(s.words) for s in flat] == sorted(len(s.words) for s in given)


def test_the_probe_learns_and_leaves_the_body_alone() -> None:
    model, given = Tagger(), sentences(8)
    body = model.base_model.embedding.weight.detach().clone()
    before = tagging.accuracy(model, tokenizer, given)
    tagging.fit_probe(model, tokenizer, given)
    assert tagging.accuracy(model, tokenizer, given) == 1.0 > before
    assert torch.equal(model.base_model.embedding.weight, body)


def test_fine_tuning_moves_all_weights_and_is_the_same_twice() -> None:
    untouched = Tagger().state_dict()
    trained = []
    for drawn in (3, 7):
        model = Tagger()
        torch.rand(drawn)  # what ran before must not matter
        tagging.fine_tune(model, tokenizer, sentences(40), batch=4, peak=1e-2, seed=1)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in untouched)
    assert not any(torch.equal(trained[0][name], untouched[name]) for name in untouched)
    unseen = torch.tensor([0, 31])  # padding is looked up but never asked; row 31 is no word
    assert torch.equal(
        trained[0]["base_model.embedding.weight"][unseen], untouched["base_model.embedding.weight"][unseen]
    )


# the numbering network


@pytest.fixture(scope="module")
def numberer() -> numbering.Numberer:
    torch.manual_seed(0)
    model = numbering.Numberer().eval()
    # Initialised as torch does, each step writes the same token; larger weights make outputs depend on inputs.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


SHARKS = ("ARVDQTPRSVTKETGESLTINC", "TRVDQTPRTATK", "GBZSV")


def test_attention_equals_the_one_whose_weights_it_takes() -> None:
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(128, 4, batch_first=True).eval(), numbering.Attention().eval()
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(numbering.linear_names(theirs.state_dict()))
    queries, memory = torch.randn(2, 5, 128), torch.randn(2, 7, 128)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        wanted = theirs(queries, memory, memory, key_padding_mask=padding)[0]
        found = ours(queries, memory, ~padding[:, None, None, :])
    torch.testing.assert_close(found, wanted)


def test_every_matrix_is_the_weight_of_a_module_that_lora_takes(numberer) -> None:
    matrices = {name for name, parameter in numberer.named_parameters() if parameter.ndim == 2}
    modules = {
        f"{name}.weight" for name, module in numberer.named_modules() if isinstance(module, nn.Linear | nn.Embedding)
    }
    assert matrices == modules
    assert len(matrices) == 25


def test_decoding_step_by_step_equals_decoding_from_the_whole(numberer) -> None:
    """The cached decoder against a causal pass over all that was written: each token is the greedy one."""
    for sequence, written in zip(SHARKS, numberer(SHARKS), strict=True):
        source = numbering.tokenize(sequence)[None]
        everything = torch.ones(1, 1, 1, source.shape[1], dtype=torch.bool)
        tokens = torch.tensor([[numbering.START, *written[:-1]]])
        # A padding token that was written is not looked at afterwards, as in the network's own code.
        seen = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool() & (tokens != numbering.PAD)
        with torch.no_grad():
            states = numberer.encode(source, everything)
            x = numberer.decoder.embed(tokens, 0)
            for layer in numberer.decoder.layers:
                x = layer(x, x, seen[None, None], states, everything)
            assert numberer.decoder.fc_out(x).argmax(-1)[0].tolist() == written


def test_a_sequence_is_numbered_alike_alone_and_padded_in_a_batch(numberer) -> None:
    together = numberer(SHARKS)
    assert together == [numberer([sequence])[0] for sequence in SHARKS]
    assert len({tuple(row[:5]) for row in together}) > 1, "the fixture must not number all alike"


def test_agreement_wants_every_token() -> None:
    assert numbering.agreement([[1, 2, 3], [4], [5]], [[1, 2, 3], [4, 4], [6]]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        numbering.agreement([[1]], [[1], [2]])


@pytest.mark.parametrize("text", ["", "<html>nothing here</html>", ">name only\n"])
def test_what_is_no_fasta_is_refused(text: str) -> None:
    with pytest.raises(DemoError, match="expected FASTA"):
        antibody.read_fasta(text)


# the table


def row(tensor: str, status: str, delta: float, **more: object) -> EnergyRow:
    plain = {
        "version": "v",
        "module": tensor.removesuffix(".weight"),
        "kind": "linear",
        "shape": (4, 4),
        "base_dtype": "F32",
        "tuned_dtype": "F32",
    }
    return EnergyRow(tensor=tensor, status=status, delta_norm=delta, **plain, **more)  # type: ignore[arg-type]


@pytest.fixture
def result(tmp_path: Path) -> table.Result:
    energies = {8: 0.25, 16: 0.5, 32: 0.75, 64: None}
    rows = [
        row("a.weight", "adapted", 3.0, rank=32, preserved_energy=0.75, written_energy=0.75, energy_at=energies),
        row(
            "b.weight",
            "adapted",
            1.0,
            rank=32,
            preserved_energy=1.0,
            written_energy=1.0,
            energy_at=dict.fromkeys(energies, 1.0),
        ),
        row("n.weight", "skipped", 2.0, reason="a norm has no low-rank form"),
        row("u.weight", "unchanged", 0.0),
    ]
    scores = pairs.Scores(base=0.1, tuned=0.9, adapted=0.65, matrices=0.7)
    pair = pairs.Pair(
        "toy",
        "toys",
        tmp_path / "base",
        tmp_path / "tuned",
        tmp_path / "adapter",
        lambda _: scores,
        promised_points=2.0,
    )
    return table.Result(pair, summarize(rows), scores, adapter_bytes=1_500_000, checkpoint_bytes=90_300_000)


def test_a_row_holds_counts_energies_sizes_and_scores(result: table.Result) -> None:
    # E_8 = (9 · 0.25 + 1 · 1) / 10: each tensor counts by its own ‖ΔW‖².
    wanted = [
        "toy",
        "2",
        "1",
        "0",
        "1",
        "32.5 %",
        "55.0 %",
        "77.5 %",
        "–",
        "1.5 MB",
        "90.3 MB",
        "10.0 %",
        "90.0 %",
        "65.0 %",
    ]
    assert table.cells(result) == wanted
    assert len(wanted) == len(table.HEADERS)


def test_notes_say_what_is_lost_and_where_the_rest_is(result: table.Result) -> None:
    text = "\n".join(table.notes(result))
    assert "25.0 points below the fine-tune" in text
    assert "left out: 1 × a norm has no low-rank form: 28.6 % of ‖ΔW‖²" in text
    assert "matrices, whole, score 70.0 %" in text
    assert str(result.pair.adapter) in text


@pytest.mark.parametrize("matrices", [None, 0.9])
def test_notes_blame_nothing_where_matrices_reach_the_fine_tune(result: table.Result, matrices: float | None) -> None:
    told = replace(result, scores=replace(result.scores, matrices=matrices))
    assert "why:" not in "\n".join(table.notes(told))


def test_without_a_terminal_columns_are_plain_and_a_row_is_a_line(result: table.Result, capsys) -> None:
    table.show([result, result])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == " ".join(table.HEADERS).split()
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[1] == lines[2]
    assert not any(character in "".join(lines) for character in "│┃━")


@pytest.mark.parametrize(("columns", "lines"), [(200, 2), (80, len(table.HEADERS) - 1)])
def test_a_drawn_table_cuts_nothing_off(result: table.Result, monkeypatch, capsys, columns: int, lines: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    table._draw([table.cells(result)] * 2)
    out = capsys.readouterr().out
    assert "…" not in out
    assert sum(line.startswith("│") for line in out.splitlines()) == lines
    assert all(cell in out for cell in [*table.HEADERS, *table.cells(result)])


# the command and the recipe


def answer(code: int, stdout: str, stderr: str = "") -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda arguments, **_: subprocess.CompletedProcess(arguments, code, stdout, stderr)


def test_an_unexpected_exit_code_is_told_with_the_command(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", answer(13, "{}"))
    with pytest.raises(DemoError, match=r"phlora verify .* ended with exit code 13, expected 0"):
        command.verify(Path("b"), Path("t"), Path("a"))


def test_an_expected_refusal_that_does_not_come_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", answer(0, "{}"))
    with pytest.raises(DemoError, match="exit code 0, expected 2"):
        command.extract(Path("b"), Path("t"), Path("a"), expect=2)


def test_output_that_is_no_json_is_told(monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", answer(0, "Traceback"))
    with pytest.raises(DemoError, match="printed no JSON: 'Traceback'"):
        command.convert(Path("a.pt"), Path("out"))


@pytest.fixture
def recipe(monkeypatch, result: table.Result):
    """The recipe's module, with every step but the printing replaced."""
    module = importlib.import_module("jobs.demo.__main__")
    monkeypatch.setattr(module, "quiet_libraries", lambda: None)
    for name in ("minilm", "antibody"):
        monkeypatch.setattr(getattr(module, name), "prepare", lambda *_: result.pair)
    monkeypatch.setattr(module.strangers, "prepare", lambda _: (Path("one"), Path("other")))
    monkeypatch.setattr(module, "refused", lambda *_: "no fine-tune")
    monkeypatch.setattr(sys, "argv", ["jobs.demo"])
    return module


@pytest.mark.parametrize(("adapted", "code"), [(0.885, 0), (0.875, 1)])
def test_the_demo_fails_when_the_adapter_is_further_than_promised(
    recipe, result, monkeypatch, capsys, adapted, code
) -> None:
    scored = replace(result, scores=replace(result.scores, adapted=adapted))
    monkeypatch.setattr(recipe, "extract_and_score", lambda _: scored)
    assert recipe.main() == code
    assert ("more than 2.0" in capsys.readouterr().err) == bool(code)


def test_a_demo_error_is_two_lines_and_exit_code_2(recipe, monkeypatch, capsys) -> None:
    def fail(_: object) -> None:
        raise DemoError("it broke", remedy="mend it")

    monkeypatch.setattr(recipe, "extract_and_score", fail)
    assert recipe.main() == 2
    assert capsys.readouterr().err == "error: it broke\n  fix: mend it\n"


def test_a_folder_that_cannot_be_written_is_no_traceback(recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    def write(root: Path, _: object) -> None:
        (root / "downloads").mkdir()

    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["jobs.demo", "--dir", str(tmp_path / "file")])
    monkeypatch.setattr(recipe.minilm, "prepare", write)
    assert recipe.main() == 2
    assert "must be writable" in capsys.readouterr().err


def test_the_negative_control_must_be_refused_for_its_own_reason(monkeypatch) -> None:
    module = importlib.import_module("jobs.demo.__main__")
    monkeypatch.setattr(subprocess, "run", answer(2, json.dumps({"error": "this is not a fine-tune of this base"})))
    assert module.refused(Path("b"), Path("t")) == "this is not a fine-tune of this base"
    monkeypatch.setattr(subprocess, "run", answer(2, json.dumps({"error": "there is no checkpoint"})))
    with pytest.raises(DemoError, match="refused for another reason"):
        module.refused(Path("b"), Path("t"))
