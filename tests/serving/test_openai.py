"""OpenAI's own client against a real server, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from foresight.runtime.pipeline import VideoPipeline
from tests.serving.conftest import listening, settings_of

# OpenAI shuts its own service down; the interface stays what others speak.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")


@pytest.fixture(scope="module")
def address(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = settings_of(bundle, tmp_path_factory.mktemp("served"), keys=("secret",))
    with listening(settings) as address:
        yield f"{address}/v1"


def test_a_video_is_created_polled_downloaded_and_deleted(address: str, pipeline: VideoPipeline) -> None:
    with openai.OpenAI(base_url=address, api_key="secret", max_retries=0) as client:
        settings = {"num_inference_steps": 3, "seed": 2, "policy": "none"}
        created = client.videos.create(model="tiny", prompt="a red circle", extra_body=settings)
        assert created.status in ("queued", "in_progress") and created.model == "tiny"
        video = client.videos.poll(created.id, poll_interval_ms=100)
        assert video.status == "completed" and video.progress == 100
        content = client.videos.download_content(video.id).read()
        assert content == pipeline("a red circle", steps=3, seed=2).to_bytes("mp4")
        assert [job.id for job in client.videos.list()] == [video.id]
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)


def test_its_errors_are_the_clients(address: str) -> None:
    with openai.OpenAI(base_url=address, api_key="secret", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="size: got 720x1280"):
            client.videos.create(prompt="a dog", size="720x1280")
        assert [model.id for model in client.models.list()] == ["tiny"]
    with (
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
