"""Who takes part in a benchmark of a bundle, and the document that comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..engines.arrays import HostArray
from ..engines.cores import available_cores
from ..engines.errors import EngineError, InvalidRequest
from ..engines.progress import OnProgress, silent
from ..runtime.pipeline import VideoPipeline
from ..runtime.policies import POLICIES, Policy
from ..runtime.policies.notation import text_of
from ..runtime.profiles import policy_of
from ..runtime.request import VideoRequest
from ..runtime.sampler import Noise
from .bench import Bench, Contender, Task
from .evaluate import Pair, ladder
from .machine import machine
from .outcome import Unavailable
from .own import policies_as_contenders
from .peers import PEERS, REFERENCE, Loaded, Peer, contenders_of, without_pipeline
from .peers.pipeline import DiffusersPipeline

LIBRARIES = ("foresight-engines", "onnxruntime", "openvino", "numpy", "torch", "diffusers", "transformers", "cache-dit")
OTHERS = 2  # requests of no pair, for what peers measure before
FIRST_OTHER = 1 << 20  # their seeds


@dataclass(frozen=True)
class BenchRequest:
    """What is asked of a benchmark; None is the bundle's default.

    `checkpoint` is what the bundle was exported from, a folder or a hub id with its revision; None has the peers left
    out. `only` names peers and policies, () all of them but those that are optional, which `optional` adds. `own` are
    policies that take part beside the settings that an evaluation tries and the bundle's profiles.
    """

    pairs: Sequence[Pair]
    checkpoint: str | None
    revision: str | None = None
    steps: int | None = None
    guidance: float | None = None
    only: tuple[str, ...] = ()
    optional: bool = False
    own: tuple[Policy, ...] = ()


def run_bench(pipeline: VideoPipeline, request: BenchRequest, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Peers and policies on all pairs, as a document of plain values. Raises InvalidRequest, EngineError."""
    manifest, defaults = pipeline.manifest, pipeline.manifest.defaults
    if manifest.dtype != "fp32" or pipeline.backend.arrays.device != "cpu":
        raise InvalidRequest(
            f"bundle: got {manifest.dtype} on {pipeline.backend.arrays.device}, expected fp32 on cpu, as the peers run"
        )
    steps = defaults.steps if request.steps is None else request.steps
    guidance = defaults.guidance if request.guidance is None else request.guidance
    peers, policies, notes = _chosen(pipeline, request)
    threads = threads_of(pipeline)
    contenders, unavailable = _peers(pipeline, request, peers, threads, steps, guidance)
    bench = Bench(
        contenders=[*policies_as_contenders(pipeline, policies, text_of), *contenders],
        pairs=request.pairs,
        noise=lambda seed: noise_of(pipeline, seed),
        steps=steps,
        guidance=guidance,
        negative_prompt=defaults.negative_prompt,
    )
    outcome = bench.run(on_progress)
    return {
        "model": manifest.model,
        "bundle": pipeline.bundle.id,
        "steps": steps,
        "guidance": guidance,
        "threads": threads,
        "pairs": [list(pair) for pair in request.pairs],
        "draws_noise": pipeline.draws_noise(steps),
        "rows": [asdict(row) for row in outcome.rows],
        "agreements": [asdict(agreement) for agreement in outcome.agreements],
        "unavailable": [asdict(missing) for missing in (*unavailable, *outcome.unavailable)],
        "notes": notes,
        "machine": machine(LIBRARIES),
    }


def names() -> list[str]:
    """Those that `only` may have: of peers and policies."""
    return [*PEERS, *POLICIES]


def noise_of(pipeline: VideoPipeline, seed: int) -> HostArray:
    """The initial noise of a request with that seed, (latent shape) fp32."""
    arrays = pipeline.backend.arrays
    drawn: HostArray = arrays.to_host(Noise((seed,), pipeline.manifest.shape.latents, arrays).draw())[0]
    return drawn


def threads_of(pipeline: VideoPipeline) -> int:
    """Those of the pipeline's engines, or the cores where they share a pool of the process."""
    told = pipeline.backend.describe().get("threads", "")
    return int(told) if told.isdigit() else available_cores()


def _chosen(pipeline: VideoPipeline, request: BenchRequest) -> tuple[list[Peer], list[Policy], list[str]]:
    """Peers, their reference among them; policies, in settings tried and tuned; and what is left out."""
    for name in request.only:
        if name not in names():
            raise InvalidRequest(f"only: got {name!r}, expected some of {', '.join(names())}")
    asked = VideoRequest(request.pairs[0].prompt, steps=request.steps, guidance=request.guidance)
    tried, notes = ladder(pipeline, asked)
    steps = pipeline.manifest.defaults.steps if request.steps is None else request.steps
    tuned = [policy_of(profile) for profile in pipeline.manifest.profiles if profile.steps == steps]
    policies = list(dict.fromkeys((*tried, *tuned, *request.own)))
    if not request.only:
        return [peer for peer in PEERS.values() if request.optional or not peer.optional], policies, notes
    peers = [peer for peer in PEERS.values() if peer.name in request.only]
    if peers and REFERENCE not in peers:
        peers.insert(0, REFERENCE)
    return peers, [policy for policy in policies if policy.name in request.only], notes


def _peers(
    pipeline: VideoPipeline,
    request: BenchRequest,
    peers: Sequence[Peer],
    threads: int,
    steps: int,
    guidance: float,
) -> tuple[list[Contender], Iterable[Unavailable]]:
    """Those that can run this model, and why the others cannot."""
    if not peers:
        return [], []
    if request.checkpoint is None:
        source = pipeline.manifest.source.checkpoint
        return [], without_pipeline(peers, f"checkpoint: only its name is known, {source}; name where it lies")
    if pipeline.manifest.later_experts:
        return [], without_pipeline(peers, "the model's transformers take turns, and peers are switched on in one")
    try:
        loaded = DiffusersPipeline(request.checkpoint, pipeline.manifest, threads, request.revision)
    except EngineError as error:
        return [], without_pipeline(peers, str(error))
    defaults = pipeline.manifest.defaults
    others = [
        Task(defaults.prompt, defaults.negative_prompt, seed, noise_of(pipeline, seed), steps, guidance)
        for seed in range(FIRST_OTHER, FIRST_OTHER + OTHERS)
    ]
    return contenders_of(peers, Loaded(loaded, steps, others))
