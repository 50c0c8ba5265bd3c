"""The HTTP interface, of a real server with a real worker."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import pytest
from starlette.testclient import TestClient

from foresight.runtime.pipeline import VideoPipeline
from foresight.serving.service import VideoService
from tests.serving import slow
from tests.serving.conftest import create, ended, served, settings_of, wait_for

LONG: dict[str, Any] = {"num_inference_steps": 100, "policy": "none"}


def frames_of(content: bytes) -> int:
    with av.open(io.BytesIO(content)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_is_created_polled_downloaded_and_deleted(
    client: TestClient, service: VideoService, pipeline: VideoPipeline
) -> None:
    shape = pipeline.manifest.shape
    job = create(client, prompt="a red circle", model="tiny", seed=7, policy="static", guidance_scale=4)
    assert (job["object"], job["status"], job["model"], job["seed"]) == ("video", "queued", "tiny", 7)
    assert job["id"].startswith("video_") and len(job["id"]) == 38 and job["prompt"] == "a red circle"
    video = ended(client, job["id"])
    assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
    assert (video["size"], video["num_frames"]) == (f"{shape.width}x{shape.height}", shape.frames)
    assert isinstance(video["seconds"], str) and video["expires_at"] > video["completed_at"] >= video["created_at"]
    assert video["stage_durations"].keys() == {"text", "denoising", "decoding", "encoding"}
    content = client.get(f"/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4" and job["id"] in content.headers["content-disposition"]
    same = pipeline("a red circle", steps=2, seed=7, guidance=4).to_bytes("mp4")
    assert frames_of(content.content) == shape.frames and content.content == same
    assert client.delete(f"/v1/videos/{job['id']}").json() == {
        "id": job["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    assert client.get(f"/v1/videos/{job['id']}").status_code == 404
    assert not service.store.output(job["id"]).exists()


def test_a_form_does_as_well_as_json(client: TestClient) -> None:
    fields = {"prompt": "a dog", "num_inference_steps": "2", "guidance_scale": "1.5", "seed": "3"}
    for body in ({"data": fields}, {"files": {name: (None, value) for name, value in fields.items()}}):
        answer = client.post("/v1/videos", **body)
        assert answer.status_code == 200, answer.text
        assert ended(client, answer.json()["id"])["status"] == "completed"


def test_what_was_skipped_is_told(client: TestClient) -> None:
    job = ended(client, create(client, num_inference_steps=20, policy="static")["id"])
    skipped = client.get(f"/v1/videos/{job['id']}/skipped").json()
    assert len(skipped["steps"]) == 20 and {len(step) for step in skipped["steps"]} == {4}
    letters = "".join(skipped["steps"])
    assert letters.count("C") == skipped["counts"]["computed"] and letters.count("R") == skipped["counts"]["reused"] > 0
    assert skipped["share_skipped"] == job["share_skipped"] == pytest.approx(1 - letters.count("C") / len(letters))


def test_settings_without_effect_and_a_prompt_that_was_cut_are_noted(client: TestClient) -> None:
    asked: dict[str, Any] = {"guidance_scale": 1, "negative_prompt": "x", "policy": "foresight:warmup=90"}
    notes = ended(client, create(client, prompt="a dog " * 600, **asked)["id"])["notes"]
    assert [note.partition(":")[0] for note in notes] == ["prompt", "warmup", "negative_prompt"]
    assert ended(client, create(client, num_inference_steps=8)["id"])["notes"] == []


def test_content_is_refused_until_it_is_there(client: TestClient) -> None:
    job = create(client, **LONG)
    for what in ("content", "skipped"):
        answer = client.get(f"/v1/videos/{job['id']}/{what}")
        assert answer.status_code == 409 and "expected completed" in answer.json()["error"]["message"]
    assert client.delete(f"/v1/videos/{job['id']}").status_code == 200


def test_to_delete_a_job_that_runs_stops_it(client: TestClient, service: VideoService) -> None:
    running = create(client, **LONG)
    wait_for(lambda: client.get(f"/v1/videos/{running['id']}").json()["progress"] > 0)
    waiting = create(client)
    assert waiting["place_in_queue"] == 0
    assert client.delete(f"/v1/videos/{running['id']}").json()["deleted"]
    assert ended(client, waiting["id"])["status"] == "completed" and service.counts == (0, 0)


def test_jobs_are_listed_page_by_page(bundle: Path, tmp_path: Path) -> None:
    with served(settings_of(bundle, tmp_path), ready=False) as (client, _):
        assert client.get("/v1/videos").json() == {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }
        ids = [create(client)["id"] for _ in range(5)]
        newest = client.get("/v1/videos", params={"limit": 2}).json()
        assert [job["id"] for job in newest["data"]] == ids[:2:-1] and newest["has_more"]
        assert (newest["first_id"], newest["last_id"]) == (ids[4], ids[3])
        rest = client.get("/v1/videos", params={"limit": 3, "after": ids[3]}).json()
        assert [job["id"] for job in rest["data"]] == ids[2::-1] and not rest["has_more"]
        oldest = client.get("/v1/videos", params={"limit": 2, "order": "asc", "after": ids[0]}).json()
        assert [job["id"] for job in oldest["data"]] == ids[1:3]
        assert client.get("/v1/videos", params={"after": "video_0"}).status_code == 404


WRONG: dict[str, tuple[dict[str, Any], str | None]] = {
    "no prompt": ({"prompt": None}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "blanks": ({"prompt": "  "}, "prompt"),
    "a long prompt": ({"prompt": "a" * 4001}, "prompt"),
    "a number": ({"prompt": 3}, "prompt"),
    "another model": ({"model": "sora-2"}, "model"),
    "another size": ({"size": "1280x720"}, "size"),
    "no size": ({"size": "big"}, "size"),
    "another length": ({"seconds": "8"}, "seconds"),
    "more frames": ({"num_frames": 1000}, "num_frames"),
    "another rate": ({"fps": 1000}, "fps"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "too many steps": ({"num_inference_steps": 101}, "num_inference_steps"),
    "much guidance": ({"guidance_scale": 21}, "guidance_scale"),
    "guidance of a second transformer": ({"guidance_scale_2": 4}, "guidance_scale_2"),
    "a negative seed": ({"seed": -1}, "seed"),
    "no policy": ({"policy": "fastest"}, "policy"),
    "a wrong setting": ({"policy": "foresight:gamma=9"}, "gamma"),
    "no profile": ({"profile": "fast"}, "profile"),
    "both": ({"profile": "fast", "policy": "none"}, "profile"),
    "a picture": ({"input_reference": "cat.png"}, "input_reference"),
    "a path": ({"output_path": "/etc/passwd"}, "output_path"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_makes_no_sense_is_refused_in_one_line(client: TestClient, kind: str) -> None:
    fields, param = WRONG[kind]
    error = create(client, 400, **fields)["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, 400)
    assert "\n" not in error["message"] and "Traceback" not in error["message"] and str(Path.home()) not in str(error)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{"),
        ("application/json", b"[1]"),
        ("application/json", b"null"),
        ("application/json", rb'{"prompt": "\ud800"}'),
        ("application/json", b"\xff"),
        ("application/json", b"[" * 100000),
        ("text/plain", b"prompt=a dog"),
        ("multipart/form-data", b"prompt"),
        ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n'),
        ("application/x-www-form-urlencoded", b"prompt=a&prompt=b"),
    ],
)
def test_bodies_that_are_none_are_refused(client: TestClient, kind: str, body: bytes) -> None:
    answer = client.post("/v1/videos", content=body, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_file_in_a_form_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/videos", data={"prompt": "a dog"}, files={"input_reference": b"png"})
    assert answer.status_code == 400 and "expected none" in answer.json()["error"]["message"]


def test_a_body_may_be_only_so_large(bundle: Path, tmp_path: Path) -> None:
    def chunks() -> Any:
        yield from [b" " * 600] * 2

    with served(settings_of(bundle, tmp_path, body_bytes=1000), ready=False) as (client, _):
        for content in (b" " * 1001, chunks()):
            answer = client.post("/v1/videos", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 413, answer.text


def test_the_same_idempotency_key_is_the_same_job(client: TestClient) -> None:
    def post(key: str, **fields: Any) -> Any:
        body = {"prompt": "a dog", "num_inference_steps": 2, **fields}
        return client.post("/v1/videos", json=body, headers={"Idempotency-Key": key})

    first, again, other = post("k1"), post("k1"), post("k2")
    assert first.json()["id"] == again.json()["id"] != other.json()["id"]
    changed = post("k1", prompt="a cat")
    assert changed.status_code == 409 and "was used for another request" in changed.json()["error"]["message"]
    assert post("no blanks").status_code == 400


def test_a_full_queue_says_when_to_try_again(bundle: Path, tmp_path: Path) -> None:
    with served(settings_of(bundle, tmp_path, waiting=2), main=slow.main) as (client, service):
        running = create(client, **LONG)
        wait_for(lambda: service.counts == (1, 0))
        waiting = [create(client) for _ in range(2)]
        answer = client.post("/v1/videos", json={"prompt": "a dog"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert len(client.get("/v1/videos").json()["data"]) == 3
        client.delete(f"/v1/videos/{running['id']}")
        assert all(ended(client, job["id"])["status"] == "completed" for job in waiting)


def test_keys_are_needed_for_all_but_health_and_see_their_own_jobs(bundle: Path, tmp_path: Path) -> None:
    settings = settings_of(bundle, tmp_path, keys=("one", "two"), jobs_per_key=1)
    with served(settings, ready=False) as (client, _):
        for path in ("/v1/videos", "/v1/models", "/metrics", "/openapi.json", "/v1/videos/video_0"):
            answer = client.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/videos", json={"prompt": "a"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer three"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Basic one"}).status_code == 401
        assert [client.get(path).status_code for path in ("/", "/health/live")] == [200, 200]
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        job = client.post("/v1/videos", json={"prompt": "a dog"}, headers=one).json()
        assert client.get(f"/v1/videos/{job['id']}", headers=one).json()["id"] == job["id"]
        for method in ("GET", "DELETE"):
            assert client.request(method, f"/v1/videos/{job['id']}", headers=two).status_code == 404
        assert client.get("/v1/videos", headers=two).json()["data"] == []
        more = client.post("/v1/videos", json={"prompt": "a dog"}, headers=one)
        assert more.status_code == 429 and "of this key" in more.json()["error"]["message"]
        assert client.post("/v1/videos", json={"prompt": "a dog"}, headers=two).status_code == 200


def test_health_says_what_it_is(bundle: Path, tmp_path: Path) -> None:
    with served(settings_of(bundle, tmp_path), ready=False) as (client, service):
        assert client.get("/health/live").status_code == 200
        for path in ("/health/ready", "/health"):
            assert (client.get(path).status_code, client.get(path).json()) == (503, {"status": "starting"})
        wait_for(lambda: service.ready)
        assert client.get("/health/ready").json() == {"status": "ready"}
        service.draining = True
        assert client.get("/health/ready").json() == {"status": "draining"}
        refused = client.post("/v1/videos", json={"prompt": "a dog"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        service.draining = False


def test_metrics_count_jobs_blocks_and_steps_and_name_no_prompt(client: TestClient, service: VideoService) -> None:
    job = create(client, prompt="an unmistakable prompt", num_inference_steps=12, policy="static")["id"]
    ended(client, job)
    text = client.get("/metrics").text
    for name in (
        'foresight:requests_total{finished_reason="completed",model="tiny"}',
        'foresight:blocks_total{decision="reused",model="tiny"}',
        'foresight:steps_total{kind="computed",model="tiny"}',
        'foresight:e2e_request_latency_s_count{model="tiny"}',
        'foresight:diffusion_exec_s_count{model="tiny"}',
        'foresight:share_skipped_count{model="tiny"}',
        "foresight:ready 1.0",
    ):
        assert name in text
    assert "unmistakable" not in text and job not in text


def test_models_are_described(client: TestClient, pipeline: VideoPipeline) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    shape = pipeline.manifest.shape
    assert (model["id"], model["size"], model["num_frames"]) == ("tiny", f"{shape.width}x{shape.height}", shape.frames)


def test_a_failure_is_told_in_one_line_and_the_next_job_is_as_ever(client: TestClient, pipeline: VideoPipeline) -> None:
    failed = ended(client, create(client, prompt="a dog", guidance_scale=20, seed=1, negative_prompt="x" * 3000)["id"])
    assert failed["status"] in ("completed", "failed")
    job = ended(client, create(client, seed=4)["id"])
    content = client.get(f"/v1/videos/{job['id']}/content").content
    assert content == pipeline("a dog", steps=2, seed=4).to_bytes("mp4")


def test_unknown_paths_and_methods_are_answered_alike(client: TestClient) -> None:
    for answer in (client.get("/v2"), client.put("/v1/videos"), client.get("/page/../api.py")):
        assert answer.status_code in (404, 405) and answer.json()["error"]["message"]


@pytest.mark.parametrize(("asked", "status"), [("bytes=0-9", 206), ("lines=0-1", 400), ("bytes=999999999-", 416)])
def test_a_part_of_a_video_is_sent_or_refused_as_all_else_is(client: TestClient, asked: str, status: int) -> None:
    job = ended(client, create(client)["id"])
    part = client.get(f"/v1/videos/{job['id']}/content", headers={"Range": asked})
    assert part.status_code == status
    if status == 206:
        assert len(part.content) == 10
    else:
        assert part.json()["error"]["code"] == status
        assert ("content-range" in part.headers) == (status == 416)


def test_the_openapi_document_says_how_errors_look(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    answers = [found["responses"] for path in document["paths"].values() for found in path.values()]
    schemas = {
        answer[status]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for answer in answers
        for status in answer
        if status >= "400"
    }
    assert schemas == {"Problem", "Health"} <= document["components"]["schemas"].keys()
    assert not any("422" in answer for answer in answers)
    assert "401" in document["paths"]["/metrics"]["get"]["responses"]


def test_the_openapi_document_names_all_fields(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    bodies = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert {"prompt", "num_inference_steps", "policy"} <= bodies["application/json"]["schema"]["properties"].keys()
    assert bodies.keys() == {"application/json", "multipart/form-data"} and json.dumps(document)
