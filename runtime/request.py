"""What a caller asks for, and every check of it. All raise InvalidRequest, before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, SupportsFloat

import numpy as np

from ..engines.arrays import Array, Arrays
from ..engines.errors import InvalidRequest, quoted
from ..engines.manifest import Manifest
from .caches import find_mode
from .embeddings import PromptEmbeddings, check_embeddings, joined
from .latents import check_latents
from .policies import Context, Policy, default_policy
from .sampler import SamplerTable, Schedule

TRACES = ("full", "summary")
MAX_CHARACTERS = 4000  # of a prompt; no model reads more than 300 tokens, which take about 1500


@dataclass(frozen=True)
class VideoRequest:
    """What a caller asks of a pipeline; what is None is the bundle's default.

    `policy` is then `Foresight()`. `prompt` is a text, or a list of them, which become one batch; `negative_prompt` and
    `guidance` are one for all of them, or a list with one for each. `seed` is one number, to which a batch adds the
    prompt's position, or one per prompt. With one `policy` a batch is decided on together: what is reused is reused for
    all. With a list of them each prompt is decided on by itself, and its video has the bytes that it has alone; the
    prompts are then denoised one after the other. Where all have a guidance of 1, the model runs without the negative
    half. `latents` is the initial noise instead: (prompts, *latent shape) or, for one prompt, the latent shape; fp32; a
    numpy array, or one that speaks DLPack; it is only read. With `to_host` False, frames and latents stay arrays of the
    device. After `deadline` seconds, waiting included, the request is cancelled. With `decode` False it ends with the
    final latents, and videos have no frames. With `trace` "summary" what single steps did is not kept.
    `prompt_embeddings`, one a prompt, are read instead of `prompt`, which then only names the videos;
    `negative_prompt_embeddings`, one for all or one a prompt, belong to them where there is a negative half that reads
    a text. `guidance_2` is that of the second transformer, in models of two that take turns; where it is None and
    `guidance` is not, the same.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str | None] | None = None
    steps: int | None = None
    guidance: float | Sequence[float | None] | None = None
    seed: int | Sequence[int] = 0
    policy: Policy | Sequence[Policy | None] | None = None
    latents: Array | None = None
    to_host: bool = True
    deadline: float | None = None
    decode: bool = True
    trace: Literal["full", "summary"] = "full"
    prompt_embeddings: PromptEmbeddings | None = None
    negative_prompt_embeddings: PromptEmbeddings | None = None
    guidance_2: float | Sequence[float | None] | None = None


@dataclass(frozen=True)
class CheckedRequest:
    """Prompts that are decided on together, as a bundle can serve them: every value is there and has been checked.

    `guidances` has one a prompt for each of the model's transformers.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    schedule: Schedule
    guidances: tuple[tuple[float, ...], ...]
    seeds: tuple[int, ...]
    policy: Policy
    latents: Array | None
    to_host: bool
    decode: bool
    trace: str
    embeddings: PromptEmbeddings | None = None
    negative_embeddings: PromptEmbeddings | None = None

    @property
    def halves(self) -> int:
        """Rows a prompt: where all have guidance 1 there is no negative half."""
        return 1 if {guidance for own in self.guidances for guidance in own} == {1} else 2

    @property
    def rows(self) -> int:
        """Of the guided batch."""
        return self.halves * len(self.prompts)

    def context(self, kinds: tuple[str, ...], turn: range) -> Context:
        """What a policy learns for the steps of one turn."""
        return Context(self.schedule, kinds, len(self.prompts), turn.start, len(turn))

    def alone(self, place: int, policy: Policy) -> CheckedRequest:
        """One of the prompts, decided on by a policy of its own."""
        one = slice(place, place + 1)
        return replace(
            self,
            prompts=self.prompts[one],
            negative_prompts=self.negative_prompts[one],
            guidances=tuple(own[one] for own in self.guidances),
            seeds=self.seeds[one],
            policy=policy,
            latents=None if self.latents is None else self.latents[one],
            embeddings=None if self.embeddings is None else self.embeddings[one],
            negative_embeddings=None if self.negative_embeddings is None else self.negative_embeddings[one],
        )


def check_request(
    request: VideoRequest, manifest: Manifest, table: SamplerTable, arrays: Arrays
) -> tuple[CheckedRequest, ...]:
    """The request with the bundle's defaults, for that bundle and device: one, or one a prompt. Raises InvalidRequest.

    Together they are as many prompts as a bundle takes.
    """
    defaults = manifest.defaults
    prompts = check_prompts(request.prompt, manifest.shape.max_batch)
    count = len(prompts)
    schedule = table.schedule(defaults.steps if request.steps is None else request.steps)
    latents, shape = request.latents, (count, *manifest.shape.latents)
    check_deadline(request.deadline)
    whole = CheckedRequest(
        prompts=prompts,
        negative_prompts=tuple(
            _check_negative(text, manifest) for text in _for_each("negative_prompt", request.negative_prompt, count)
        ),
        schedule=schedule,
        guidances=_check_guidances(request, manifest, count),
        seeds=check_seeds(request.seed, count),
        policy=check_policy(None) if _is_list(request.policy) else check_policy(request.policy),
        latents=None if latents is None else check_latents(latents, shape, arrays),
        to_host=request.to_host,
        decode=request.decode,
        trace=check_trace(request.trace),
    )
    whole = _with_embeddings(whole, request, manifest)
    if not _is_list(request.policy):
        _check_decider(whole, manifest)
        return (whole,)
    policies = _for_each("policy", request.policy, count)
    alone = [whole.alone(place, check_policy(policy)) for place, policy in enumerate(policies)]
    for one in alone:
        _check_decider(one, manifest)
    return tuple(alone)


def check_prompts(prompts: Any, most: int | None = None) -> tuple[str, ...]:
    """One prompt, or a list or tuple of up to `most` (None: any number); each some text."""
    listed = prompts if isinstance(prompts, (list, tuple)) else (prompts,)
    if not listed:
        raise InvalidRequest("prompt: got none, expected at least one")
    if most is not None and len(listed) > most:
        raise InvalidRequest(
            f"prompts: got {len(listed)} at once, this bundle takes {most}; send fewer, or export with a larger "
            "max_batch"
        )
    return tuple(check_text("prompt", prompt) for prompt in listed)


def check_text(name: str, text: Any, may_be_empty: bool = False) -> str:
    """Text that a tokenizer can read, of at most `MAX_CHARACTERS`."""
    if isinstance(text, str) and len(text) > MAX_CHARACTERS:
        raise InvalidRequest(
            f"{name}: got {len(text)} characters, expected at most {MAX_CHARACTERS}; shorten it, no model reads so much"
        )
    if not isinstance(text, str) or not (may_be_empty or text.strip()):
        raise InvalidRequest(f"{name}: got {quoted(text)}, expected some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name}: got {quoted(text)}, expected Unicode text, without surrogates") from error
    return text


def _check_guidances(request: VideoRequest, manifest: Manifest, prompts: int) -> tuple[tuple[float, ...], ...]:
    first, *later = manifest.experts
    if request.guidance_2 is not None and not later:
        raise InvalidRequest(
            f"guidance_2: got {quoted(request.guidance_2)}, expected none: this model has one transformer; leave it out"
        )
    given = list(_for_each("guidance", request.guidance, prompts))
    second = list(_for_each("guidance_2", request.guidance_2, prompts))
    found = [tuple(check_guidance(first.guidance if value is None else value) for value in given)]
    for expert in later:
        # as pipelines of diffusers have it: who gives one gives it for all
        values = [
            next((v for v in (two, one) if v is not None), expert.guidance)
            for one, two in zip(given, second, strict=True)
        ]
        found.append(tuple(check_guidance(value, "guidance_2") for value in values))
    return tuple(found)


def check_guidance(guidance: SupportsFloat, name: str = "guidance") -> float:
    """A number of 1 (no guidance) or more, that fp32 can hold."""
    try:
        value = float(guidance)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not 1 <= value <= float(np.finfo(np.float32).max):
        raise InvalidRequest(f"{name}: got {quoted(guidance)}, expected a finite number of 1 (none) or more")
    return value


def check_seeds(seed: int | Sequence[int], prompts: int) -> tuple[int, ...]:
    """One seed per prompt: those given, or the one given and those that follow it."""
    wrong = InvalidRequest(f"seed: got {quoted(seed)}, expected a number of 0 or more, or one per prompt ({prompts})")
    try:
        seeds = _given(seed, prompts) if isinstance(seed, Iterable) else _following(seed, prompts)
    except TypeError as error:
        raise wrong from error
    if len(seeds) != prompts or min(seeds) < 0:
        raise wrong
    return seeds


def check_policy(policy: Any) -> Policy:
    """The policy itself, or for None the default."""
    if policy is None:
        return default_policy()
    if not isinstance(policy, Policy):
        raise InvalidRequest(
            f"policy: got {quoted(policy)}, expected one such as Foresight(…), Forecast(…), Static(…) or NoReuse()"
        )
    find_mode(policy.cache)
    return policy


def check_deadline(deadline: Any) -> None:
    """Seconds above 0, or None."""
    if deadline is not None and not (isinstance(deadline, (int, float)) and deadline > 0):
        raise InvalidRequest(
            f"deadline: got {quoted(deadline)}, expected seconds above 0, or None for as long as needed"
        )


def check_trace(trace: Any) -> str:
    """How much of a request is recorded."""
    if trace not in TRACES:
        raise InvalidRequest(f"trace: got {quoted(trace)}, expected {' or '.join(TRACES)}")
    return str(trace)


def check_count(name: str, value: Any) -> None:
    """A whole number of 1 or more, or None."""
    try:
        fits = value is None or operator.index(value) >= 1
    except TypeError:
        fits = False
    if not fits:
        raise InvalidRequest(f"{name}: got {quoted(value)}, expected a whole number of 1 or more")


def _given(seeds: Iterable[int], prompts: int) -> tuple[int, ...]:
    return tuple(map(operator.index, islice(seeds, prompts + 1)))


def _following(seed: int, prompts: int) -> tuple[int, ...]:
    first = operator.index(seed)
    return tuple(range(first, first + prompts))


def _check_negative(negative_prompt: str | None, manifest: Manifest) -> str:
    default = manifest.defaults.negative_prompt
    text = check_text("negative_prompt", default if negative_prompt is None else negative_prompt, True)
    if manifest.text.null_caption and text:
        raise InvalidRequest(
            f"negative_prompt: got {quoted(text)}, expected none: this model reads a learnt null caption instead; "
            "leave it out"
        )
    return text


def _with_embeddings(whole: CheckedRequest, request: VideoRequest, manifest: Manifest) -> CheckedRequest:
    positive, negative, count = request.prompt_embeddings, request.negative_prompt_embeddings, len(whole.prompts)
    if positive is None:
        if negative is not None:
            raise InvalidRequest("negative_prompt_embeddings: got some without prompt_embeddings, expected both")
        return whole
    checked = check_embeddings("prompt_embeddings", positive, manifest, count)
    if whole.halves == 1 or manifest.text.null_caption:
        return replace(whole, embeddings=checked)
    if negative is None:
        raise InvalidRequest(
            "negative_prompt_embeddings: got none beside prompt_embeddings, expected some; encode the negative prompt "
            "too, '' for instance"
        )
    if isinstance(negative, PromptEmbeddings) and len(negative) == 1:
        negative = joined([negative] * count)
    of_negative = check_embeddings("negative_prompt_embeddings", negative, manifest, count)
    return replace(whole, embeddings=checked, negative_embeddings=of_negative)


def _check_decider(request: CheckedRequest, manifest: Manifest) -> None:
    """A policy may refuse a request."""
    kinds = tuple(block.kind for block in manifest.blocks)
    for turn in request.schedule.turns([expert.below for expert in manifest.later_experts]):
        request.policy.begin(request.context(kinds, turn))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _for_each(name: str, value: Any, prompts: int) -> Sequence[Any]:
    """A setting's value for each of the prompts: those of a list, or the one."""
    if not _is_list(value):
        return [value] * prompts
    if len(value) != prompts:
        raise InvalidRequest(f"{name}: got {len(value)}, expected one for all prompts, or one for each ({prompts})")
    return list(value)
