"""What goes over HTTP: OpenAI's video objects, with the fields that vLLM-Omni and SGLang add."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..engines.errors import InvalidRequest
from .pool import VideoJob
from .spec import Model, Spec
from .store import Record

MOST_PROMPT = 4000
MOST_SEED = 2**63 - 1


FIELDS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "guidance_2": "guidance_scale_2"}


def in_fields(message: str) -> str:
    """A message about an argument, named as clients know it."""
    name, colon, rest = message.partition(":")
    return f"{FIELDS.get(name, name)}{colon}{rest}"


class CreateVideo(BaseModel):
    """The body of a request for a video. Size, length and rate are the bundle's: they may be left out, or said."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False)

    prompt: str = Field(min_length=1, max_length=MOST_PROMPT)
    model: str | None = Field(default=None, max_length=200)
    size: str | None = Field(default=None, pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")
    seconds: str | int | float | None = None
    fps: int | None = Field(default=None, ge=1, le=1000)
    num_frames: int | None = Field(default=None, ge=1, le=100000)
    num_inference_steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=20, allow_inf_nan=False)
    guidance_scale_2: float | None = Field(default=None, ge=0, le=20, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    negative_prompt: str | None = Field(default=None, max_length=MOST_PROMPT)
    policy: str | None = Field(default=None, max_length=200, examples=["forecast:tolerance=0.01"])
    profile: str | None = Field(default=None, max_length=100)
    priority: int = Field(default=0, ge=-100, le=100)
    user: str | None = Field(default=None, max_length=200)

    def spec(self, models: dict[str, Model], seed: int) -> Spec:
        """What is asked of the service; `seed` is drawn for those who give none. Raises InvalidRequest."""
        name = self.model if self.model is not None else next(iter(models))
        if name not in models:
            raise InvalidRequest(f"model: got {name[:40]!r}, expected one of {', '.join(models)}")
        self._check_shape(models[name])
        return Spec(
            model=name,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            steps=self.num_inference_steps,
            guidance=_at_least_one(self.guidance_scale),
            guidance_2=_at_least_one(self.guidance_scale_2),
            seed=seed if self.seed is None else self.seed,
            policy=self.policy,
            profile=self.profile,
        )

    def _check_shape(self, model: Model) -> None:
        """Raises InvalidRequest where the bundle makes other videos."""
        shape, fps = model.bundle.manifest.shape, model.bundle.manifest.defaults.fps
        made: dict[str, Any] = {
            "size": f"{shape.width}x{shape.height}",
            "num_frames": shape.frames,
            "fps": fps,
        }
        for name, has in made.items():
            got = getattr(self, name)
            if got is not None and got != has:
                raise InvalidRequest(f"{name}: got {got}, expected {has}, which {model.name} was exported for")
        if self.seconds is not None and _seconds(self.seconds) != seconds_of(shape.frames, fps):
            raise InvalidRequest(
                f"seconds: got {str(self.seconds)[:20]}, expected {seconds_of(shape.frames, fps)}, which {model.name} "
                "was exported for; leave it out"
            )


def _at_least_one(guidance: float | None) -> float | None:
    """Clients say 0 for none, too."""
    return None if guidance is None else max(guidance, 1.0)


class Error(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A job, as OpenAI shows it, with what vLLM-Omni adds; `seconds` is text there."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None = None
    error: Error | None = None
    phase: str
    place_in_queue: int | None = None
    num_frames: int
    fps: int
    num_inference_steps: int
    seed: int
    policy: dict[str, Any] | None = None
    media_type: str | None = None
    file_name: str | None = None
    inference_time_s: float | None = None
    stage_durations: dict[str, float] | None = None
    peak_memory_mb: float | None = None
    share_skipped: float | None = None
    notes: list[str] = []


class VideoList(BaseModel):
    """Jobs, newest first unless asked otherwise."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A job that is there no longer."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Skipped(BaseModel):
    """What was skipped: a text a step, in it a letter a block: Computed, Reused, Dead (not needed), Forecast."""

    id: str
    steps: list[str]
    counts: dict[str, int]
    share_skipped: float


class ProblemDetail(BaseModel):
    """What is wrong, in one line, with the field it is about where there is one; `code` is the status."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: int


class Problem(BaseModel):
    """The body of every answer that is an error."""

    error: ProblemDetail


class Health(BaseModel):
    """What the server does."""

    status: Literal["live", "ready", "starting", "draining", "failed"]


class ServedProfile(BaseModel):
    """A tuned policy of a bundle, by its name."""

    name: str
    num_inference_steps: int
    policy: str


class ServedModel(BaseModel):
    """A bundle that is served, and what it makes."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "foresight"
    family: str
    bundle: str
    size: str
    num_frames: int
    fps: int
    num_inference_steps: int
    max_inference_steps: int
    guidance_scale: float
    sample_prompt: str
    takes_negative_prompt: bool
    profiles: list[ServedProfile]


class ModelList(BaseModel):
    """What is served."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


def video_object(record: Record, model: Model, job: VideoJob | None) -> VideoObject:
    """A job as clients see it."""
    spec, result, failure = record.spec, record.result, record.failure
    shape, defaults = model.bundle.manifest.shape, model.bundle.manifest.defaults
    percent = {"completed": 100}.get(record.status, 0 if job is None else job.percent)
    stages = None if result is None else result.stages
    return VideoObject(
        id=record.id,
        model=spec.model,
        status=record.status,
        progress=percent,
        created_at=int(record.created_at),
        completed_at=None if record.completed_at is None else int(record.completed_at),
        expires_at=None if record.expires_at is None else int(record.expires_at),
        prompt=spec.prompt,
        size=f"{shape.width}x{shape.height}",
        seconds=seconds_of(shape.frames, defaults.fps),
        error=None if failure is None else Error(code=failure.code, message=in_fields(failure.message)),
        phase=record.status if job is None or record.status != "in_progress" else job.phase,
        place_in_queue=None if job is None else job.place,
        num_frames=shape.frames,
        fps=defaults.fps,
        num_inference_steps=spec.steps or defaults.steps,
        seed=spec.seed,
        policy=None if result is None else result.policy,
        media_type=None if result is None else "video/mp4",
        file_name=None if result is None else f"{record.id}.mp4",
        inference_time_s=None if stages is None else sum(stages.values()),
        stage_durations=stages,
        peak_memory_mb=None if result is None else result.peak_bytes / 2**20,
        share_skipped=None if result is None else result.share_skipped,
        notes=[] if result is None else [in_fields(note) for note in result.notes],
    )


def seconds_of(frames: int, fps: int) -> str:
    """The length of a video in seconds, as text."""
    return f"{frames / fps:g}"


def _seconds(given: str | int | float) -> str:
    try:
        return f"{float(given):g}"
    except (ValueError, OverflowError):
        return str(given)
