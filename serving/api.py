"""The HTTP interface: OpenAI's /v1/videos, health, metrics, and the page for people."""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from .. import __version__
from ..engines.errors import ForesightError, InvalidRequest, OutputError, QueueFull
from .auth import Keys
from .metrics import Metrics
from .middleware import Authorised, BodyLimit, problem
from .schemas import (
    CreateVideo,
    Deleted,
    Health,
    ModelList,
    Problem,
    ServedModel,
    Skipped,
    VideoList,
    VideoObject,
    in_fields,
    video_object,
)
from .service import Conflict, VideoService
from .store import Record

STATUS: tuple[tuple[type[ForesightError], int], ...] = (
    (InvalidRequest, 400),
    (Conflict, 409),
    (QueueFull, 429),
    (OutputError, 507),
)
PAGE = {"app.js": "text/javascript", "style.css": "text/css"}
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C: any other is ignored
KEY = r"^[\x21-\x7e]{1,200}$"
BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": CreateVideo.model_json_schema(ref_template="#/components/schemas/{model}")}
            for kind in ("application/json", "multipart/form-data")
        },
    }
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": words}
    for status, words in {
        400: "The request makes no sense",
        401: "No valid key",
        404: "There is no such job, or none of this key's",
        409: "That contradicts what there is",
        413: "The body is too large",
        429: "Too many wait; Retry-After says when to try again",
        503: "The server is being shut down",
        507: "The disk does not take it",
    }.items()
}
MP4 = {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The video", "content": MP4},
    206: {"description": "What Range asks for of it", "content": {**MP4, "multipart/byteranges": MP4["video/mp4"]}},
    416: {"model": Problem, "description": "Range asks for what is not in it"},
}
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "No video would be made now"}}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
    401: PROBLEMS[401],
}

videos = APIRouter(prefix="/v1", responses=PROBLEMS)
around = APIRouter()
log = logging.getLogger("foresight.serving")


class VideoResponse(FileResponse):
    """A file, or the part of it that Range asks for; a Range that it cannot answer is refused as all else is."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        refused: Message | None = None

        async def sending(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = message
            if refused is None:
                await send(message)

        await super().__call__(scope, receive, sending)
        if refused is not None:
            status, size = refused["status"], Headers(raw=refused["headers"]).get("content-range")
            message = "range: got none that this video can answer, expected such as bytes=0-99"
            headers = {} if size is None else {"Content-Range": size}
            await problem(status, message, **headers)(scope, receive, send)


class Application(FastAPI):
    """Its document has no 422, which FastAPI adds to all that take arguments: what makes no sense is a 400 here."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, as a new object."""
        document: dict[str, Any] = json.loads(json.dumps(super().openapi()))
        for operation in (found for path in document["paths"].values() for found in path.values()):
            operation["responses"].pop("422", None)
        for schema in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(schema, None)
        return document


def create_app(service: VideoService) -> FastAPI:
    """The ASGI application of a service, which it closes when it is shut down."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = Application(title="Foresight", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.metrics = Metrics(service)
    app.add_middleware(BodyLimit, most=service.settings.body_bytes)
    app.add_middleware(Authorised, keys=Keys(service.settings.keys))
    app.add_exception_handler(ForesightError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _unexpected)
    app.include_router(videos)
    app.include_router(around)
    return app


@videos.post("/videos", openapi_extra=BODIES)
async def create_video(
    request: Request, idempotency_key: Annotated[str | None, Header(pattern=KEY)] = None
) -> VideoObject:
    """Begin to make a video. With an Idempotency-Key that was used before, the job that was begun then."""
    service, owner = _service(request), _owner(request)
    asked = await _body(request)
    # who asks again with the same key, and gave no seed, means the same video
    seed = secrets.randbelow(2**31) if idempotency_key is None else _seed_of(owner, idempotency_key)
    spec = asked.spec(service.models, seed)
    span = request.headers.get("traceparent", "")
    parent = span if TRACEPARENT.fullmatch(span) else None
    record = await run_in_threadpool(service.create, owner, spec, idempotency_key, asked.priority, parent)
    return _shown(service, record)


@videos.get("/videos")
def list_videos(
    request: Request,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """The jobs of this key, newest first."""
    service, owner = _service(request), _owner(request)
    if after is not None:
        _found(service, owner, after)
    records = service.store.page(owner, after, limit + 1, order == "desc")
    shown = [_shown(service, record) for record in records[:limit]]
    return VideoList(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(records) > limit,
    )


@videos.get("/videos/{video_id}")
def retrieve_video(request: Request, video_id: str) -> VideoObject:
    """How far a job is."""
    service = _service(request)
    return _shown(service, _found(service, _owner(request), video_id))


@videos.get("/videos/{video_id}/content", response_class=FileResponse, responses=CONTENT)
def video_content(request: Request, video_id: str, variant: Literal["video"] = "video") -> Response:
    """The video, as mp4. Raises 409 before it is there."""
    service = _service(request)
    record = _finished(service, _owner(request), video_id)
    path = service.store.output(record.id)
    if not path.is_file():
        raise HTTPException(404, "video: its file is there no longer; make it again")
    return VideoResponse(path, media_type="video/mp4", filename=path.name)


@videos.get("/videos/{video_id}/skipped")
def video_skipped(request: Request, video_id: str) -> Skipped:
    """What was skipped, step by step and block by block."""
    service = _service(request)
    record = _finished(service, _owner(request), video_id)
    assert record.result is not None
    return Skipped(
        id=record.id,
        steps=list(record.result.steps),
        counts=record.result.counts,
        share_skipped=record.result.share_skipped,
    )


@videos.delete("/videos/{video_id}")
def delete_video(request: Request, video_id: str) -> Deleted:
    """Stop a job where it runs, within one block, and forget it and its video."""
    service = _service(request)
    service.delete(_found(service, _owner(request), video_id))
    return Deleted(id=video_id)


@videos.get("/models")
def list_models(request: Request) -> ModelList:
    """What is served."""
    service = _service(request)
    return ModelList(data=[ServedModel(id=model.name, **model.describe()) for model in service.models.values()])


@around.get("/health/live")
def live() -> Health:
    """Whether this process answers."""
    return Health(status="live")


@around.get("/health/ready", response_model=Health, responses=NOT_READY)
@around.get("/health", response_model=Health, responses=NOT_READY)
def ready(request: Request) -> JSONResponse:
    """Whether videos are made: a worker has loaded all models and warmed up."""
    service = _service(request)
    if service.ready:
        return JSONResponse({"status": "ready"})
    why = "draining" if service.draining else "failed" if service.pool.failure else "starting"
    return JSONResponse({"status": why}, 503)


@around.get("/metrics", response_class=Response, responses=METRICS)
def metrics(request: Request) -> Response:
    """For Prometheus."""
    text: bytes = request.app.state.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@around.get("/", include_in_schema=False)
def page() -> Response:
    """The page for people."""
    return _page_file("index.html", "text/html")


@around.get("/page/{name}", include_in_schema=False)
def page_file(name: str) -> Response:
    """What the page is made of."""
    if name not in PAGE:
        raise HTTPException(404, "page: there is no such file")
    return _page_file(name, PAGE[name])


def _page_file(name: str, kind: str) -> Response:
    content = (files(__package__) / "page" / name).read_bytes()
    policy = "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; frame-ancestors 'none'"
    return Response(content, media_type=kind, headers={"Content-Security-Policy": policy})


def _service(request: Request) -> VideoService:
    service: VideoService = request.app.state.service
    return service


def _owner(request: Request) -> str:
    owner: str = request.state.owner
    return owner


def _found(service: VideoService, owner: str, video: str) -> Record:
    record = service.get(owner, video)
    if record is None:
        raise HTTPException(404, "video: there is none with this id")
    return record


def _finished(service: VideoService, owner: str, video: str) -> Record:
    record = _found(service, owner, video)
    if record.status != "completed":
        raise HTTPException(409, f"video: is {record.status}, expected completed; ask for its status until it is")
    return record


def _shown(service: VideoService, record: Record) -> VideoObject:
    return video_object(record, service.model(record), service.live(record))


async def _body(request: Request) -> CreateVideo:
    """Raises InvalidRequest."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            fields = json.loads(await request.body())
        elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            async with request.form(max_files=1, max_fields=50) as form:
                fields = _fields_of(form.multi_items())
        else:
            raise InvalidRequest("content-type: expected application/json or multipart/form-data")
        return CreateVideo.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(_words(error.errors()[0])) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest("body: got no valid JSON") from error


def _fields_of(items: list[tuple[str, Any]]) -> dict[str, str]:
    """Raises InvalidRequest for files, and for fields that come twice."""
    fields: dict[str, str] = {}
    for name, value in items:
        if not isinstance(value, str):
            raise InvalidRequest(f"{name[:40]}: got a file, expected none: videos are made of text alone")
        if name in fields:
            raise InvalidRequest(f"{name[:40]}: got it twice, expected it once")
        fields[name] = value
    return fields


def _words(found: Any) -> str:
    """The first thing that is wrong, in one line; what was sent is not repeated."""
    where = ".".join(str(part)[:40] for part in found["loc"]) or "body"
    return f"{where}: {found['msg']}"


def _seed_of(owner: str, key: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{owner} {key}".encode()).digest()[:4], "big") // 2


async def _ours(request: Request, error: Exception) -> Response:
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    headers = {}
    if isinstance(error, QueueFull):
        status = 503 if _service(request).draining else status
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 1)))
    if status >= 500 and not isinstance(error, QueueFull):
        log.error("request failed", extra={"reason": str(error)})
        return problem(status, "server: cannot keep jobs now; its disk may be full")
    message = in_fields(str(error))
    param = message.partition(":")[0] if isinstance(error, InvalidRequest) else None
    return problem(status, message, param, **headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem(400, _words(error.errors()[0]))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), **dict(error.headers or {}))


async def _left(request: Request, error: Exception) -> Response:
    return problem(400, "body: its client left before all of it had come")  # nobody reads it


async def _unexpected(request: Request, error: Exception) -> Response:
    return problem(500, "server: failed; its log says why")
