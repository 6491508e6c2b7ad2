"""The file as a whole: bases, models, where they are looked for, and what fits together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from phlora_pipeline import config, storage
from phlora_pipeline.errors import NotFoundError, RequestError, quoted
from phlora_pipeline.zoofile.document import Document, Path, parse
from phlora_pipeline.zoofile.places import canonical, folder_of, is_id, model_id, within
from phlora_pipeline.zoofile.secrets import refuse_secrets
from phlora_pipeline.zoofile.settings import ExtractSettings, Limits, RunSettings, Strict, merge, refused

MAX_BYTES = 1 << 20
_REMEDY = "see zoo.schema.json, or start from what `phlora init` writes"
_WORDS = {
    "missing": "it must be given",
    "model_type": "expected keys with values",
    "dict_type": "expected keys with values",
    "tuple_type": "expected a list",
    "string_type": "expected text",
}


def _absolute(url: str) -> str:
    try:
        return storage.normalize(url)
    except RequestError as error:
        raise refused(error.what, remedy=error.remedy) from error


def _base_id(text: str) -> str:
    if "/" in text:
        raise refused(f"{quoted(text)} cannot be a base's id: it has a slash", remedy="put the hub's name under `name`")
    return _id(text)


def _id(text: str) -> str:
    try:
        return model_id(text)
    except RequestError as error:
        raise refused(error.what, remedy=error.remedy) from error


Url = Annotated[str, AfterValidator(_absolute)]
Glob = Annotated[str, Field(min_length=1)]


class Base(Strict):
    """A checkpoint that fine-tunes are compared with, and that servers run."""

    url: Url = Field(description="a folder or one .safetensors file; a path or URL")
    name: str = Field(
        default="", description="for servers and adapter_config.json: a hub id or a served name, never a path"
    )

    @model_validator(mode="before")
    @classmethod
    def _only_a_url(cls, data: Any) -> Any:
        return {"url": data} if isinstance(data, str) else data

    @field_validator("name")
    @classmethod
    def _as_in_an_extraction(cls, name: str) -> str:
        try:
            return config.run_config(base="/base", tuned="/tuned", base_name=name).base_name
        except RequestError as error:
            raise refused(error.what.removeprefix("base_name: "), remedy="such as meta-llama/Llama-3.1-8B") from error


class Model(Strict):
    """A fine-tune that is listed by hand."""

    url: Url = Field(description="a folder or one .safetensors file; a path or URL")
    id: Annotated[str, AfterValidator(_id)] = Field(
        default="", description="its name in the output; left out: the last component of the url"
    )
    base: str = Field(default="", description="id of its base; left out: found from its config.json or model card")
    extract: ExtractSettings = Field(default=ExtractSettings(), description="what is set otherwise for this model")

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_place(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("id") and isinstance(data.get("url"), str):
            return {**data, "id": storage.basename(data["url"])}
        return data


class Rule(Strict):
    """A base for folders of certain names."""

    match: Glob = Field(description="glob of the folder's name, case-sensitive")
    base: str = Field(description="id of the base")


class Discover(Strict):
    """A place where checkpoints land: each folder with a config.json and safetensors is a model."""

    prefix: Url = Field(description="models are looked for in the folders below it")
    depth: int = Field(default=1, ge=1, le=4, description="how many folders deep; nothing is looked for inside a model")
    base: str = Field(
        default="", description="id of the base of all of them; left out: found from each one's own files"
    )
    rules: tuple[Rule, ...] = Field(default=(), description="bases by folder name, the first match counts")
    exclude: tuple[Glob, ...] = Field(default=(), description="globs of folder names that are passed over")


class Override(Strict):
    """Settings for models of certain ids."""

    match: Glob = Field(description="glob of the model's id, case-sensitive")
    extract: ExtractSettings = Field(description="what is set otherwise for these")


class ZooConfig(Strict):
    """`zoo.yaml`."""

    output: Url = Field(description="where the adapters go: beside the checkpoints, not among them")
    bases: dict[Annotated[str, AfterValidator(_base_id)], Base] = Field(
        default_factory=dict, description="by id: a URL, or {url: ..., name: ...}"
    )
    models: tuple[Model, ...] = Field(default=(), description="fine-tunes listed by hand")
    discover: tuple[Discover, ...] = Field(default=(), description="where fine-tunes are looked for")
    overrides: tuple[Override, ...] = Field(default=(), description="settings by model id, later ones win")
    extract: ExtractSettings = Field(default=ExtractSettings(), description="settings of all models")
    run: RunSettings = Field(default=RunSettings(), description="how a run works")
    limits: Limits = Field(default=Limits(), description="what one run may take at most")
    keep: int = Field(default=3, ge=0, description="superseded versions of a model that gc leaves")

    @model_validator(mode="after")
    def _fits_together(self) -> ZooConfig:
        seen: dict[str, int] = {}
        for number, model in enumerate(self.models):
            if seen.setdefault(model.id, number) != number:
                raise refused(
                    f"id {model.id!r} is there twice, first as models[{seen[model.id]}] ({self.models[seen[model.id]].url})",
                    remedy="give one of them another id",
                    at=("models", number, "id"),
                )
        for at, base in _references(self):
            if base and base not in self.bases:
                raise refused(
                    f"there is no base {quoted(base)}; bases: {', '.join(self.bases) or 'none'}",
                    remedy="name one of the bases, or add it to them",
                    at=at,
                )
        for at, source in _sources(self):
            _require_apart(self.output, source, at)
        for at, layers in _layers(self):
            try:
                merge(layers)
            except RequestError as error:
                raise refused(error.what, at=at) from error
        return self


def settings_for(zoo: ZooConfig, model: str, own: ExtractSettings | None = None) -> ExtractSettings:
    """All settings of one model: the zoo's, changed by the overrides that match its id in order, then by its own.

    Raises:
        RequestError: together they make no sense.
    """
    matching = [override.extract for override in zoo.overrides if fnmatchcase(model, override.match)]
    return merge([zoo.extract, *matching, *([own] if own else [])])


def load(url: str) -> ZooConfig:
    """A zoo.yaml from a local path or a URL.

    Raises:
        RequestError: it is not there, or something in it is wrong; names file and line.
    """
    url = storage.normalize(url)
    info = storage.stat(url)
    if info is None:
        raise NotFoundError(f"there is no zoo file at {url}", remedy="write one by phlora init URL > zoo.yaml")
    data = storage.read_object(info, limit=MAX_BYTES)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{url}, line {line}: not UTF-8 text", remedy="save it as UTF-8") from error
    return loads(text, url)


def loads(text: str, name: str = "zoo.yaml") -> ZooConfig:
    """A zoo.yaml from its text.

    Args:
        text: the YAML.
        name: of the file, for messages.

    Raises:
        RequestError: something in it is wrong; names file and line.
    """
    document = parse(text.removeprefix("\ufeff"), name)
    refuse_secrets(document)
    if not isinstance(document.data, dict):
        what = "it is empty" if document.data is None else "expected keys with values"
        raise document.refusal((), what, remedy=_REMEDY)
    try:
        return ZooConfig.model_validate(document.data)
    except ValidationError as error:
        # The first by line; the others will be told when it is mended.
        first = min(error.errors(), key=lambda details: document.line(_path(details)))
        raise _told(document, first) from error


def schema() -> dict[str, Any]:
    """The JSON schema of zoo.yaml, for editors; `phlora_pipeline/zoo.schema.json` is this."""
    made = ZooConfig.model_json_schema()
    made["$defs"]["Base"] = {"anyOf": [{"type": "string"}, made["$defs"]["Base"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "zoo.yaml of phlora-pipeline"}


def _references(zoo: ZooConfig) -> Iterator[tuple[Path, str]]:
    for number, model in enumerate(zoo.models):
        yield ("models", number, "base"), model.base
    for number, place in enumerate(zoo.discover):
        yield ("discover", number, "base"), place.base
        for position, rule in enumerate(place.rules):
            yield ("discover", number, "rules", position, "base"), rule.base


def _sources(zoo: ZooConfig) -> Iterator[tuple[Path, str]]:
    yield from ((("bases", base, "url"), spec.url) for base, spec in zoo.bases.items())
    yield from ((("models", number, "url"), model.url) for number, model in enumerate(zoo.models))
    yield from ((("discover", number, "prefix"), place.prefix) for number, place in enumerate(zoo.discover))


def _layers(zoo: ZooConfig) -> Iterator[tuple[Path, list[ExtractSettings]]]:
    yield ("extract",), [zoo.extract]
    for number, override in enumerate(zoo.overrides):
        yield ("overrides", number, "extract"), [zoo.extract, override.extract]
    for number, model in enumerate(zoo.models):
        matching = [override.extract for override in zoo.overrides if fnmatchcase(model.id, override.match)]
        yield ("models", number), [zoo.extract, *matching, model.extract]


def _require_apart(output: str, source: str, at: Path) -> None:
    where = _shown(at)
    if within(output, source) or canonical(output) == canonical(folder_of(source)):
        raise refused(
            f"the output {output} lies inside {source} ({where})", remedy="put it beside, not inside", at=("output",)
        )
    if within(source, output):
        raise refused(
            f"{source} lies inside the output {output}, where gc takes what is no adapter for leftovers",
            remedy="put the output beside, not around",
            at=at,
        )


def _path(details: ErrorDetails) -> Path:
    return *(part for part in details["loc"] if part != "[key]"), *details.get("ctx", {}).get("at", ())


def _told(document: Document, details: ErrorDetails) -> RequestError:
    """A validation error in our words, with its line."""
    path, context = _path(details), details.get("ctx", {})
    what = context.get("what") or (str(context["error"]) if "error" in context else None)
    if what is None:
        what = _WORDS.get(details["type"]) or details["msg"][:1].lower() + details["msg"][1:]
        if details["type"] != "missing":
            what += f", got {quoted(details['input'])}"
    elif what.startswith("unknown key"):
        path = path[:-1]
    where = f"{_shown(path)}: " if path else ""
    return document.refusal(_path(details), f"{where}{what}", remedy=context.get("remedy") or _REMEDY)


def _shown(path: Path) -> str:
    """A path as one would write it.

    >>> _shown(("models", 3, "extract", "rank"))
    'models[3].extract.rank'
    """
    parts = (f"[{part}]" if isinstance(part, int) else f".{part if is_id(part) else quoted(part)}" for part in path)
    return "".join(parts).removeprefix(".")
