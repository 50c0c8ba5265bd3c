"""The demo models, by name."""

from __future__ import annotations

from demo.model import Model
from demo.models import cogvideox, latte, open_sora, wan

MODELS: dict[str, Model] = {model.name: model for model in (latte.MODEL, cogvideox.MODEL, open_sora.MODEL, wan.MODEL)}
