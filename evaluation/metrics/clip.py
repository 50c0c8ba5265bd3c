"""CLIP score, Hessel et al. 2021, by torchmetrics: how well frames fit their prompt, 0 to 100; it compares nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .base import Judged, Measure, weights_of

MODEL = "openai/clip-vit-large-patch14"


def load_clip() -> Measure:
    """The model, on the GPU where there is one, from the hub's cache."""
    import torch
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with weights_of("clip"):
        parts = _Features(CLIPModel.from_pretrained(MODEL)), CLIPProcessor.from_pretrained(MODEL)
    score = CLIPScore(model_name_or_path=lambda: parts)

    def measure(videos: Iterable[Judged]) -> float:
        score.reset()
        with torch.no_grad():
            for video in videos:
                for frame in video.frames:
                    score.update(torch.from_numpy(frame).permute(2, 0, 1).to(device), video.prompt)
            return float(score.compute())

    return measure


class _Features:
    """What torchmetrics asks of the model: features as arrays, which transformers 5 hands out inside of others."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = model.config

    def to(self, device: Any) -> _Features:
        self._model.to(device)
        return self

    def get_image_features(self, pixels: Any) -> Any:
        return self._model.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens: Any, attention_mask: Any) -> Any:
        return self._model.get_text_features(tokens, attention_mask).pooler_output
