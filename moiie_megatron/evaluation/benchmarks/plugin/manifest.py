"""What lmms-eval registers: the entry point ``lmms_eval.models``."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

_HERE = __name__.rpartition(".")[0]

MANIFESTS = (
    ModelManifest("moiie", chat_class_path=f"{_HERE}.exported_model.ExportedChat"),
    ModelManifest("moiie_server", chat_class_path=f"{_HERE}.server_model.ServerChat"),
)
