"""A first zoo.yaml for a place full of checkpoints: what was found, what was guessed, and every setting at its default."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from phlora_pipeline import storage, zoofile
from phlora_pipeline.errors import RequestError, SourceChangedError
from phlora_pipeline.storage import basename
from phlora_pipeline.zoo.folders import THREADS, Folder, checkpoints_below, named_bases, shown
from phlora_pipeline.zoofile import scalar, within

MAX_DEPTH = 4
MOST_RULES = 50
_URL = re.compile(r"[a-z0-9]+://[A-Za-z0-9._-]+/[A-Za-z0-9._/-]+")


@dataclass(frozen=True, slots=True)
class Group:
    """Fine-tunes of one base.

    Attributes:
        name: of the base, as the fine-tunes' files have it.
        place: its folder, where it lies among the fine-tunes; empty where it does not.
        models: folders, as paths from the prefix.
    """

    name: str
    place: str
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A base as the file will have it.

    Attributes:
        id, url, name: as in `bases`.
        remark: what the reader should see to.
        models: its fine-tunes, as paths from the prefix.
    """

    id: str
    url: str
    name: str
    remark: str
    models: tuple[str, ...]

    def is_called(self, name: str) -> bool:
        """Whether the catalog will know it by this name."""
        return _key(name) in {_key(label) for label in (self.id, self.url, self.name) if label}


def init(url: str) -> str:
    """The text of a zoo.yaml for the checkpoints below a place.

    Raises:
        RequestError: there are none.
    """
    prefix = storage.normalize(url)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="phlora-init") as pool:
        depth, folders = _scan(prefix, pool)
        guesses = dict(zip((folder.path for folder in folders), pool.map(_guess, folders), strict=True))
    groups, orphans = grouped(guesses, {folder.path: folder.url for folder in folders})
    text = _text(prefix, depth, _proposals(prefix, groups), guesses, orphans)
    zoofile.loads(text, "the proposed zoo.yaml")  # what it proposes must hold, whatever the folders are called
    return text


def _scan(prefix: str, pool: ThreadPoolExecutor) -> tuple[int, list[Folder]]:
    for depth in range(1, MAX_DEPTH + 1):
        found = [folder for folder in checkpoints_below(prefix, depth, pool) if folder.is_checkpoint]
        if found:
            return depth, found
    raise RequestError(
        f"no checkpoints below {prefix}, {MAX_DEPTH} folders deep",
        remedy="give the folder above them: a checkpoint is a folder with config.json and *.safetensors",
    )


def _guess(folder: Folder) -> str:
    """What its own files call the base; empty where they say nothing, or only its own name."""
    try:
        for _, names in named_bases(folder.files):
            for name in names:
                if _key(name) != _key(folder.path):
                    return name
    except (RequestError, SourceChangedError):  # the catalog will say what is wrong with it
        pass
    return ""


def grouped(guesses: Mapping[str, str], places: Mapping[str, str]) -> tuple[list[Group], list[str]]:
    """Models by base, the largest group first; and those of which nothing is known.

    A fine-tune of a fine-tune belongs to the base that both come from: that is what is served.

    Args:
        guesses: a model's path → what it calls its base, or empty.
        places: a model's path → its URL.
    """
    paths = {_key(path): path for path in places}
    names: dict[str, str] = {}
    members: dict[str, list[str]] = defaultdict(list)
    for path in guesses:
        if root := _root(path, guesses, paths):
            names.setdefault(_key(root), root)
            members[_key(root)].append(path)
    groups = [
        Group(names[key], places.get(paths.get(key, ""), ""), tuple(sorted(found))) for key, found in members.items()
    ]
    known = {paths.get(key) for key in members}.union(*members.values())
    return sorted(groups, key=lambda group: (-len(group.models), group.name)), sorted(set(guesses) - known)


def _root(path: str, guesses: Mapping[str, str], paths: Mapping[str, str]) -> str:
    """The name at the end of the chain of guesses; empty where it goes round."""
    seen, name = {path}, guesses[path]
    while (following := paths.get(_key(name))) is not None and guesses[following]:
        if following in seen:
            return ""
        seen.add(following)
        name = guesses[following]
    return name


def _key(name: str) -> str:
    return basename(name).lower()


def _proposals(prefix: str, groups: Sequence[Group]) -> list[Proposal]:
    made: dict[str, Proposal] = {}
    for number, group in enumerate(groups, start=1):
        key = basename(group.name)
        if key in made or not _takes(key):
            key = f"unnamed-base-{number}"
        url, remark = _place(prefix, key, group)
        made[key] = Proposal(key, url, group.name if _is_hub_id(group.name) else "", remark, group.models)
    return list(made.values())


def _takes(base_id: str) -> bool:
    """Whether a zoo.yaml takes it as a base's id."""
    try:
        zoofile.loads(f"output: /adapters\nbases: {{{scalar(base_id)}: /base}}")
    except RequestError:
        return False
    return True


def _place(prefix: str, key: str, group: Group) -> tuple[str, str]:
    if group.place:
        return group.place, ""
    if _URL.fullmatch(group.name) and not within(_output(prefix), group.name):
        return group.name, "  # <- as its fine-tunes name it"
    if _is_hub_id(group.name):
        return f"hf://{group.name}", "  # <- a copy in your own storage is quicker"
    return f"{prefix}-bases/{key}", "  # <- not found here: where is it?"


def _output(prefix: str) -> str:
    return f"{prefix}-adapters"


def _is_hub_id(name: str) -> bool:
    organisation, slash, model = name.partition("/")
    try:
        return bool(slash) and zoofile.model_id(name) == f"{organisation}--{model}"
    except RequestError:
        return False


def _text(
    prefix: str, depth: int, bases: Sequence[Proposal], guesses: Mapping[str, str], orphans: Sequence[str]
) -> str:
    count = sum(len(base.models) for base in bases) + len(orphans)
    lines = [
        f"# Written by phlora init: {_fine_tunes(count)} below {scalar(prefix)}.",
        "# Check what is marked with <-, then: phlora plan zoo.yaml",
        "",
        "# Adapters go here: beside the checkpoints, never among them.",
        f"output: {scalar(_output(prefix))}  # <-",
        "",
        *_bases(bases),
        "",
        "# Each folder with a config.json and safetensors is a model, named after the folder. Its base is found by its",
        "# config.json or model card; `base: ID` says it for all, a rule for folders of a name.",
        "discover:",
        f"  - prefix: {scalar(prefix)}",
        f"    depth: {depth}",
        *_rules(bases, guesses, orphans),
        '    # exclude: ["tmp-*"]',
        *_REST,
    ]
    return "\n".join(lines) + "\n"


def _bases(bases: Sequence[Proposal]) -> list[str]:
    if not bases:
        return ["# No file says what the base is: put it here, and make a rule below.", "bases: {}  # <- llama-8b: URL"]
    lines = ["# Every base that the fine-tunes come from. `name` is what servers call it.", "bases:"]
    for base in bases:
        name = f", name: {scalar(base.name)}" if base.name else ""
        lines.append(f"  # {_fine_tunes(len(base.models))}: {shown(base.models)}")
        lines.append(f"  {scalar(base.id)}: {{url: {scalar(base.url)}{name}}}{base.remark}")
    return lines


def _rules(bases: Sequence[Proposal], guesses: Mapping[str, str], orphans: Sequence[str]) -> list[str]:
    """For those that their own files do not lead to a base: fine-tunes of fine-tunes, and the silent ones."""
    example = scalar(bases[0].id if bases else "llama-8b")
    told = [(path, base.id) for base in bases for path in base.models if not base.is_called(guesses[path])]
    guessed = [(path, bases[0].id) for path in orphans] if bases else []
    lines = [f"    # {len(orphans)} do not say what they come from: {shown(orphans)}."] if orphans else []
    if not told and not guessed:
        return [*lines, f'    # rules: [{{match: "*-8b-*", base: {example}}}]']
    lines.append("    rules:  # <- for the silent ones, the base of the most others" if guessed else "    rules:")
    chosen = [*told, *guessed]
    lines += [
        f"      - {{match: {scalar(_literal(basename(path)))}, base: {scalar(base)}}}"
        for path, base in chosen[:MOST_RULES]
    ]
    if len(chosen) > MOST_RULES:
        lines.append(f"      # and {len(chosen) - MOST_RULES} more, which will be told as models without a base")
    return lines


def _fine_tunes(count: int) -> str:
    return f"{count} fine-tune{'' if count == 1 else 's'}"


def _literal(name: str) -> str:
    """A glob that matches this name alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


_REST = """
# Settings of all models; `overrides` change them by model id, later ones win.
extract:
  rank: 32              # or auto, or instead energy: 0.9 or budget: 200MB: as many as each tensor needs
  targets: all          # all | linear | paper
  carry: none           # none | all: norms and biases kept whole; only for peft
  for: portable         # portable: what PEFT, vLLM, SGLang, NIM and llama.cpp all load; or one of them: peft, vllm, sglang, nim, gguf, kohya
  dtype: auto
  solver: auto
  # preset: paper       # in place of rank, targets and solver, which win over it: 32, paper, exact
overrides: []           # - {match: "support-*", extract: {rank: 64}}

run:
  engine: auto          # ray where there are several devices, or a cluster
  share_base: auto      # models of one base are converted together; the base is read once

limits:                 # of one run; 0: none
  max_models: 0
  max_bytes: 0          # such as 20TB
  max_minutes: 0
  max_models_due: 100   # more than this needs --yes

keep: 3                 # superseded versions that gc leaves for each model""".splitlines()
