"""What a client asks for, as plain values: stored, sent to another process, and made into a request there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..engines.arrays import Arrays
from ..engines.bundle import Bundle, open_bundle
from ..engines.errors import IntegrityError, InvalidRequest
from ..engines.manifest import Manifest
from ..engines.verify import verify_file
from ..runtime.limits import RequestLimits
from ..runtime.notes import notes_on
from ..runtime.policies import Policy
from ..runtime.policies.notation import policy_from_text
from ..runtime.profiles import check_profiles, profile_policy
from ..runtime.request import VideoRequest, check_request
from ..runtime.sampler import SamplerTable, load_table
from ..runtime.trace import Trace
from .settings import WorkerSettings


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One video. None is the bundle's default; `policy` is a word such as `forecast:tolerance=0.01`."""

    model: str
    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    policy: str | None = None
    profile: str | None = None
    guidance_2: float | None = None


@dataclass(frozen=True)
class Model:
    """A bundle that is served, as far as requests are checked against it; none of its engines is loaded."""

    name: str
    bundle: Bundle
    table: SamplerTable

    def check(self, spec: Spec, limits: RequestLimits) -> VideoRequest:
        """The request, which can be made and is within limits. Raises InvalidRequest."""
        request = request_of(spec, self.bundle.manifest)
        limits.check(request, self.bundle.manifest)
        check_request(request, self.bundle.manifest, self.table, Arrays())
        return request

    @property
    def cautions(self) -> tuple[str, ...]:
        """What the checkpoint was not trained for."""
        return self.bundle.manifest.cautions

    def describe(self) -> dict[str, Any]:
        """What a client may want to know, as plain values."""
        manifest = self.bundle.manifest
        shape, defaults = manifest.shape, manifest.defaults
        return {
            "family": manifest.model,
            "bundle": self.bundle.id,
            "size": f"{shape.width}x{shape.height}",
            "num_frames": shape.frames,
            "fps": defaults.fps,
            "num_inference_steps": defaults.steps,
            "max_inference_steps": self.table.max_steps,
            "guidance_scale": defaults.guidance,
            "sample_prompt": defaults.prompt,
            "takes_negative_prompt": not manifest.text.null_caption,
            "profiles": [
                {"name": profile.name, "num_inference_steps": profile.steps, "policy": profile.policy}
                for profile in manifest.profiles
            ],
        }


def request_of(spec: Spec, manifest: Manifest) -> VideoRequest:
    """What a pipeline of that manifest is asked. Raises InvalidRequest."""
    policy: Policy | None = None
    if spec.profile is not None and spec.policy is not None:
        raise InvalidRequest("profile: got a profile and a policy, expected one of them: a profile is a policy")
    if spec.profile is not None:
        policy = profile_policy(manifest, spec.profile, spec.steps)
    elif spec.policy is not None:
        policy = policy_from_text(spec.policy)
    return VideoRequest(
        spec.prompt, spec.negative_prompt, spec.steps, spec.guidance, spec.seed, policy, guidance_2=spec.guidance_2
    )


def check_same(bundle: Bundle, opened: str) -> None:
    """Whether a bundle is the one, by its id, that requests were checked against. Raises IntegrityError."""
    if bundle.id != opened:
        raise IntegrityError(
            f"bundle {bundle.path}: is another one than when its requests were checked ({bundle.id[:12]}…, expected "
            f"{opened[:12]}…); start again, and export to a new folder instead of one that is in use"
        )


def notes_of(spec: Spec, trace: Trace) -> tuple[str, ...]:
    """What who asked should know of the video: settings that changed nothing, and a prompt that was cut."""
    given = {name for name in Spec.__struct_fields__ if getattr(spec, name) is not None}
    cut = ["prompt: is longer than the model reads; the rest was cut off"] if trace.truncated_prompts else []
    return (*cut, *notes_on(trace, given))


def named_bundles(texts: Iterable[str]) -> dict[str, Path]:
    """Bundles by the names they are served under: NAME=FOLDER, or that of the folder. Raises InvalidRequest."""
    named: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        folder = Path(path if equals else text)
        served_as = name if equals else folder.resolve().name
        if served_as in named:
            raise InvalidRequest(f"bundles: got {served_as!r} twice, expected names that differ: NAME={folder}")
        named[served_as] = folder
    return named


def open_models(settings: WorkerSettings) -> dict[str, Model]:
    """All bundles that are served, by name. Raises BundleError, IntegrityError, InvalidRequest."""
    if not settings.bundles:
        raise InvalidRequest("bundles: got none, expected at least one to serve")
    models = {}
    for name, path in settings.bundles.items():
        bundle = open_bundle(path, settings.signed_by)
        check_profiles(bundle)
        sampler = bundle.manifest.sampler
        verify_file(bundle.path, sampler.table, bundle.manifest.files[sampler.table], lambda count: None)
        models[name] = Model(name, bundle, load_table(bundle.file(sampler.table), sampler.max_steps, sampler.kept))
    return models
