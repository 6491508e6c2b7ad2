"""`zoo.yaml`: which checkpoints, which bases, where the adapters go. Validated once, at the edge, with the line of what is wrong.

`document` turns YAML into plain data with line numbers (the only home of yaml), `secrets` refuses what must not be in a
file that is committed, `places` knows ids and which places are the same, `settings` has what may be set for a model and for a run, `config` is the file as a whole.
"""

from phlora_pipeline.zoofile.config import (
    Base,
    Discover,
    Model,
    Override,
    Rule,
    ZooConfig,
    load,
    loads,
    schema,
    settings_for,
)
from phlora_pipeline.zoofile.document import front_matter, scalar
from phlora_pipeline.zoofile.places import canonical, folder_of, model_id, within
from phlora_pipeline.zoofile.settings import ExtractSettings, Limits, RunSettings, merge

__all__ = [
    "Base",
    "Discover",
    "ExtractSettings",
    "Limits",
    "Model",
    "Override",
    "Rule",
    "RunSettings",
    "ZooConfig",
    "canonical",
    "folder_of",
    "front_matter",
    "load",
    "loads",
    "merge",
    "model_id",
    "scalar",
    "schema",
    "settings_for",
    "within",
]
