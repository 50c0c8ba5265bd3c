"""Metrics: the registry's rows, what is said where a library is missing, and what the libraries are given."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from foresight.engines.errors import InvalidRequest
from foresight.evaluation.metrics import METRICS, Judged, Measure, find_metrics, load_metrics
from tests.test_packaging import project

OPTIONAL = [metric for metric in METRICS.values() if metric.modules]


def frames(seed: int, shape: tuple[int, int, int] = (2, 32, 48)) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


VIDEO = Judged(frames(0), frames(1), "a dog")
OTHER = Judged(frames(2), frames(1), "a cat")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules that stand in for libraries, by their names, while the test fills them."""

    class Modules(dict[str, ModuleType]):
        def __missing__(self, name: str) -> ModuleType:
            self[name] = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, self[name])
            return self[name]

    return Modules()


def measure_of(name: str) -> Measure:
    return load_metrics(find_metrics([name]))[-1].measure


@pytest.mark.parametrize("metric", OPTIONAL, ids=lambda metric: metric.name)
def test_a_missing_library_is_told_with_its_extra(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, metric.modules[0], None)
    with pytest.raises(InvalidRequest) as refused:
        find_metrics([metric.name])
    message = str(refused.value)
    assert message.startswith(f"metrics: {metric.name} needs {metric.modules[0]}, which cannot be imported (")
    assert message.endswith(f'; pip install "foresight-engines[{metric.extra}]", or leave {metric.name} out')
    assert "\n" not in message


def test_every_extra_is_one_of_the_package() -> None:
    assert {metric.extra for metric in OPTIONAL} <= project()["project"]["optional-dependencies"].keys()
    assert all((metric.extra is None) == (not metric.modules) for metric in METRICS.values())


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    assert measure_of("psnr")([VIDEO]) == pytest.approx(peak_signal_noise_ratio(VIDEO.reference, VIDEO.frames))
    each = [
        structural_similarity(frame, other, channel_axis=-1)
        for frame, other in zip(VIDEO.frames, VIDEO.reference, strict=True)
    ]
    assert measure_of("ssim")([VIDEO]) == pytest.approx(np.mean(each))


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_of_several_videos_it_is_the_mean(name: str) -> None:
    measure = measure_of(name)
    assert measure([VIDEO, OTHER]) == pytest.approx((measure([VIDEO]) + measure([OTHER])) / 2)


def test_lpips_is_given_frames_from_minus_one_to_one(libraries: dict[str, ModuleType]) -> None:
    class Network:
        def __init__(self, net: str, verbose: bool) -> None:
            assert (net, verbose) == ("alex", False)

        def to(self, device: str) -> Network:
            return self

        def __call__(self, frame: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            assert frame.shape == other.shape == (1, 3, 32, 48) and frame.dtype == torch.float32
            assert -1 <= float(frame.min()) < -0.9 and 0.9 < float(frame.max()) <= 1
            return (frame - other).abs().mean().reshape(1, 1, 1, 1)

    libraries["lpips"].LPIPS = Network  # type: ignore[attr-defined]
    measure = measure_of("lpips")
    expected = np.abs(VIDEO.frames.astype(float) - VIDEO.reference).mean() / 127.5
    assert measure([VIDEO]) == pytest.approx(expected, rel=1e-5)
    assert measure([Judged(VIDEO.frames, VIDEO.frames, "a dog")]) == 0
    small = frames(0, (2, 30, 48))
    with pytest.raises(InvalidRequest, match="metrics: got frames of 30 x 48 for lpips, expected at least 31 x 31"):
        measure([Judged(small, small, "a dog")])


def test_clip_is_given_every_frame_with_its_prompt(
    libraries: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    class Score:
        """Counts; and asks for features as torchmetrics does."""

        def __init__(self, model_name_or_path: Any) -> None:
            self.model, self.processor = model_name_or_path()

        def reset(self) -> None:
            self.seen: list[str] = []

        def update(self, image: torch.Tensor, prompt: str) -> None:
            assert image.shape == (3, 32, 48) and image.dtype == torch.uint8
            model = self.model.to(image.device)
            assert model.get_image_features(image[None, :, :32, :32] / 255).norm(p=2, dim=-1).shape == (1,)
            tokens = torch.tensor([[1, 5, 2]])
            assert model.get_text_features(tokens, torch.ones_like(tokens)).shape == (1, 8)
            assert model.config.text_config.max_position_embeddings == 77
            self.seen.append(prompt)

        def compute(self) -> torch.Tensor:
            assert set(self.seen) == {"a dog"}
            return torch.tensor(float(len(self.seen)))

    _ = libraries["torchmetrics"], libraries["torchmetrics.multimodal"]
    libraries["torchmetrics.multimodal.clip_score"].CLIPScore = Score  # type: ignore[attr-defined]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 9, "max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda name: model)
    monkeypatch.setattr(CLIPProcessor, "from_pretrained", lambda name: SimpleNamespace())
    measure = measure_of("clip")
    assert measure([VIDEO]) == 2
    assert measure([VIDEO]) == 2, "it begins anew with every call"
    assert not METRICS["clip"].compares


def test_fvd_is_given_whole_videos_and_prints_nothing(
    libraries: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    class Distance:
        def __init__(self, model: str, n_real: str, n_fake: str, device: str) -> None:
            sys.stdout.write(f"loading {model}")
            assert n_real == n_fake == "full"

        def empty_real_stats(self) -> None:
            self.real: list[Any] = []

        def empty_fake_stats(self) -> None:
            self.fake: list[Any] = []

        def add_real_stats(self, videos: Any) -> None:
            self.real.append(videos)

        def add_fake_stats(self, videos: Any) -> None:
            self.fake.append(videos)

        def compute_fvd_from_stats(self) -> float:
            assert self.real[0].shape == (1, 2, 32, 48, 3) and self.real[0].dtype == np.uint8
            real, fake = (float(np.concatenate(those).mean()) for those in (self.real, self.fake))
            return real - fake

    _ = libraries["cdfvd"]
    libraries["cdfvd.fvd"].cdfvd = Distance  # type: ignore[attr-defined]
    measure = measure_of("fvd")
    expected = VIDEO.reference.mean() - (VIDEO.frames.mean() + OTHER.frames.mean()) / 2
    assert measure(iter([VIDEO, OTHER])) == measure([VIDEO, OTHER]) == pytest.approx(expected)
    assert METRICS["fvd"].of_set
    assert capsys.readouterr().out == ""


def test_missing_weights_are_told(libraries: dict[str, ModuleType]) -> None:
    def refuse(**settings: Any) -> None:
        raise OSError("<urlopen error no route>")

    libraries["lpips"].LPIPS = refuse  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match="metrics: the weights of lpips cannot be loaded .*no route.*; put them"):
        measure_of("lpips")
