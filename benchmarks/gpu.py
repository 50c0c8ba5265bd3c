"""Latte-1 at real size on an NVIDIA GPU: engines per block against one graph and torch, and what skipping saves.

Weights are random, the prompt is one guided one: a batch of two rows. Three questions, to every backend that runs
here; what does not run is left out, and the result says why.

- What does a step without reuse take? Candidates take turns, as in benchmarks/step_time.py: torch, eager and compiled;
  the whole transformer as one graph, which is what cutting it into blocks is to be measured against; and one engine
  per block, as the runtime calls them, caches and distances included.
- What does a skipped block cost? As in benchmarks/skipping.py. And of a step, what is the host's own time? That is the
  time it did not wait for the device; once blocks are skipped, it is what is left.
- Is memory as planned? The plan counts weights, scratch and arrays; what the device had less of at the end also has
  the library's kernels and workspaces in it.

What is made on the way (checkpoint, bundle, engines) stays under --work for the next run. Without a GPU,
`--device cpu --size small` shows that the script works, and nothing else.

    python -m benchmarks.gpu --save
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benchmarks.common import finish, median, reason_of, table
from benchmarks.real_size import LATTE_1
from benchmarks.skipping import compare, policies_of, take_turns
from benchmarks.step_time import CRASHED, ROWS, TEXT_TOKENS, Step, measure, multiply_adds
from foresight.engines.arrays import MEBI, Array, Arrays, create_arrays, gpu_facts, numpy_dtype
from foresight.engines.backend import Backend, Engine, create_backend
from foresight.engines.bundle import MANIFEST, open_bundle
from foresight.engines.manifest import Manifest, Part
from foresight.runtime.cache import Layout, create_cache
from foresight.runtime.pipeline import load
from foresight.runtime.trace import Trace

if TYPE_CHECKING:  # diffusers may be missing here, and torch
    from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "latte-1": LATTE_1,
    "small": {"heads": 2, "head_dim": 16, "pairs": 2, "frames": 4, "sample_size": 16},
}
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
COMPILING = ("tensorrt", "tensorrt-rtx")
BACKENDS = (*COMPILING, "onnxruntime")
# A block meets its last set of addresses in its third step, and CUDA graphs record a set when it comes again.
WARM_UP = 6


@dataclass(frozen=True)
class Candidate:
    """A way to run one step. `backend` is torch, or one that foresight knows."""

    backend: str
    form: Literal["eager", "compiled", "per block", "one graph"]
    cuda_graphs: bool = False

    @property
    def name(self) -> str:
        """As in the tables."""
        return ", ".join((self.backend, self.form, *(("CUDA graphs",) if self.cuda_graphs else ())))


EAGER = Candidate("torch", "eager")
CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        EAGER,
        Candidate("torch", "compiled"),
        *(
            Candidate(backend, form, cuda_graphs)
            for backend in BACKENDS
            for form in ("per block", "one graph")
            for cuda_graphs in (False, True)
            if backend in COMPILING or not cuda_graphs
        ),
    )
}


@dataclass(frozen=True)
class Setup:
    """What is measured: where it lies, and the device it runs on."""

    device: str
    dtype: str
    opset: int
    checkpoint: Path
    bundle: Path
    graph: Path

    @property
    def threads(self) -> int | None:
        """One on a CPU, which is for trying the script: threads that wait for each other suffer from company."""
        return 1 if self.device == "cpu" else None


class Unavailable(Exception):
    """Something cannot be made or run here, and the message says why."""


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function, run in a process of its own, with which its memory goes. Raises Unavailable."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            result, reason = process.submit(_attempt, function, arguments).result()
        except BrokenProcessPool:
            reason = CRASHED
    if reason is not None:
        raise Unavailable(reason)
    return result


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None]:
    try:
        return function(*arguments), None
    except Exception as error:  # noqa: BLE001 - of any library
        return None, reason_of(error)


@dataclass(frozen=True)
class Rule:
    """How something is made, from what else, and where it lies if it was made before."""

    needs: tuple[str, ...]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    there: Path | None = None


class Preparation:
    """Makes what candidates need, each thing once and only when one needs it; `facts` is what making it returned."""

    def __init__(self, rules: Mapping[str, Rule], impossible: Mapping[str, str]) -> None:
        self.facts: dict[str, Any] = {}
        self._rules = rules
        self._outcomes: dict[str, str | None] = dict(impossible)

    def obtain(self, what: str) -> None:
        """Make it, or find it. Raises Unavailable."""
        if what not in self._outcomes:
            try:
                self._make(what, self._rules[what])
                self._outcomes[what] = None
            except Unavailable as error:
                self._outcomes[what] = str(error)
        reason = self._outcomes[what]
        if reason is not None:
            raise Unavailable(reason)

    def _make(self, what: str, rule: Rule) -> None:
        if rule.there is not None and rule.there.exists():
            return
        for need in rule.needs:
            self.obtain(need)
        started = time.perf_counter()
        self.facts[what] = apart(rule.function, *rule.arguments)
        _say(f"{what}: {time.perf_counter() - started:.0f} s")


def rules_of(setup: Setup, size: Mapping[str, Any], jobs: int) -> dict[str, Rule]:
    """How to make everything that candidates need."""
    rules = {
        "torch": Rule((), check_torch, (setup.device,)),
        "device": Rule((), device_facts, (setup.device,)),
        "checkpoint": Rule((), make_checkpoint, (setup.checkpoint, size), setup.checkpoint),
        "bundle": Rule(("checkpoint",), export_bundle, (setup,), setup.bundle / MANIFEST),
        "graph": Rule(("checkpoint", "bundle"), export_graph, (setup,), setup.graph),
    }
    for backend in COMPILING:
        rules[f"{backend}, per block"] = Rule(("device", "bundle"), build_blocks, (setup, backend, jobs))
        rules[f"{backend}, one graph"] = Rule(("device", "graph"), build_graph, (setup, backend))
    return rules


def needs_of(candidate: Candidate) -> tuple[str, ...]:
    """What must be there for a candidate, by the names of `rules_of`."""
    if candidate.backend == "torch":
        return "torch", "checkpoint"
    plans = (f"{candidate.backend}, {candidate.form}",) if candidate.backend in COMPILING else ()
    return "device", *plans, "bundle", *(("graph",) if candidate.form == "one graph" else ())


def check_torch(device: str) -> None:
    """Fail where torch or diffusers is missing, or torch cannot use the device."""
    import torch
    from diffusers import LatteTransformer3DModel

    assert LatteTransformer3DModel is not None
    torch.zeros(1, device=device)


def device_facts(device: str) -> dict[str, str]:
    """The GPU, its driver and CUDA; nothing for a CPU. Raises EngineError where the GPU cannot be used."""
    return {} if device == "cpu" else gpu_facts(device) | driver_facts()


def driver_facts() -> dict[str, str]:
    """What nvidia-smi says of the first GPU, where there is one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(("gpu", "driver", "gpu_memory"), values, strict=False)) if done.returncode == 0 else {}


def make_checkpoint(folder: Path, size: Mapping[str, Any]) -> None:
    """Write a random checkpoint."""
    from benchmarks.checkpoints import random_latte

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.rename(random_latte(partial, **size), folder)


def export_bundle(setup: Setup) -> None:
    """Export the checkpoint, one graph per block."""
    from foresight.exporter.export import Export
    from foresight.exporter.models.base import Request

    request = Request(dtype=setup.dtype, max_batch=ROWS // 2)  # type: ignore[arg-type]
    Export("latte", request, str(setup.checkpoint), setup.bundle, setup.opset).run()


def export_graph(setup: Setup) -> None:
    """Export the transformer as one graph."""
    import torch

    from foresight.exporter.graph import graph_from_module, write_graph

    manifest = open_bundle(setup.bundle).manifest
    part, sizes, module = whole_part(manifest), request_sizes(manifest), whole_module(setup, manifest)
    types = {spec.name: getattr(torch, TORCH_NAMES[spec.dtype]) for spec in part.inputs}
    graph = graph_from_module(
        module,
        {spec.name: torch.zeros(spec.resolve(sizes), dtype=types[spec.name]) for spec in part.inputs},
        [spec.name for spec in part.outputs],
        {spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in part.inputs},
        setup.opset,
    )
    folder = setup.graph.parent
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_graph(graph, module.get_parameter, partial / setup.graph.name)
    os.rename(partial, folder)


def whole_module(setup: Setup, manifest: Manifest) -> nn.Module:
    """The modules that the bundle's parts were exported from, one after the other; distances are not asked for."""
    import torch
    from diffusers import LatteTransformer3DModel

    from foresight.exporter.models.latte import Block, Epilogue, Prologue

    dtype = getattr(torch, TORCH_NAMES[setup.dtype])
    transformer = LatteTransformer3DModel.from_pretrained(setup.checkpoint, subfolder="transformer", torch_dtype=dtype)
    torch.nn.Module.to(transformer, dtype)  # buffers too, past diffusers' own to()
    positions = transformer.temp_pos_embed[:, :, None]
    pairs = zip(transformer.transformer_blocks, transformer.temporal_transformer_blocks, strict=True)

    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prologue = Prologue(transformer)
            self.blocks = torch.nn.ModuleList(
                block
                for index, (spatial, temporal) in enumerate(pairs)
                for block in (Block(spatial, False), Block(temporal, True, None if index else positions))
            )
            self.epilogue = Epilogue(transformer, manifest.shape.latents)

        def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_bias: Tensor) -> Tensor:
            hidden, modulation, time = self.prologue(latents, timestep)
            for block in self.blocks:
                hidden, _ = block(hidden, modulation, hidden, *(() if block.temporal else (text, text_bias)))
            output: Tensor = self.epilogue(hidden, time)
            return output

    return Transformer().eval()


def whole_part(manifest: Manifest) -> Part:
    """The transformer as one part: the inputs that no part of it computes, and what comes out at the end."""
    parts = (manifest.prologue, *manifest.blocks, manifest.epilogue)
    inside = {spec.name for part in parts for spec in part.outputs} | {f"cached_{name}" for name in manifest.streams}
    inputs = {spec.name: spec for part in parts for spec in part.inputs if spec.name not in inside}
    return Part(
        name="transformer",
        kind="transformer",
        graph="transformer.onnx",
        inputs=tuple(inputs.values()),
        outputs=manifest.epilogue.outputs,
        max_difference=0.0,
    )


def build_blocks(setup: Setup, backend: str, jobs: int) -> dict[str, Any]:
    """Build the plans of all parts, or find them; returns what it took."""
    from foresight.engines.build import build_engines

    compiled = build_engines(open_bundle(setup.bundle), backend, setup.device, jobs=jobs)
    parts = compiled.index.parts.values()
    return {
        "seconds": round(sum(part.build_seconds for part in parts), 1),
        "plans_mib": _mib(compiled.plan_bytes),
        "scratch_mib": _mib(compiled.scratch_bytes),
        "attention_not_fused_in": sum(not part.fused_attention for part in parts),
    }


def build_graph(setup: Setup, backend: str) -> dict[str, Any]:
    """Build the plan of the whole transformer, or find it; returns what it took."""
    from foresight.engines.build import build_apart
    from foresight.engines.tensorrt import BuildSettings, profile_of

    path = plan_path(setup, backend)
    facts = path.with_suffix(".json")
    if not facts.exists():
        manifest = open_bundle(setup.bundle).manifest
        profile = profile_of(whole_part(manifest), manifest.ranges)
        plan = build_apart(backend, setup.graph, profile, BuildSettings())
        path.write_bytes(plan.data)
        made = {
            "seconds": plan.seconds,
            "plans_mib": _mib(len(plan.data)),
            "scratch_mib": _mib(plan.scratch_bytes),
            "attention_not_fused_in": int(not plan.fused_attention),
        }
        facts.write_text(json.dumps(made), encoding="utf-8")
    found: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return found


def plan_path(setup: Setup, backend: str) -> Path:
    """Where the plan of the whole transformer for this device lies. Raises EngineError."""
    from foresight.engines.compiled import fingerprint
    from foresight.engines.tensorrt import find_target

    return setup.graph.with_name(f"{backend}-{fingerprint(find_target(backend, setup.device))}.plan")


def torch_step(setup: Setup, compiled: bool) -> Step:
    """One forward of the diffusers transformer."""
    import torch
    from diffusers import LatteTransformer3DModel

    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    dtype = getattr(torch, TORCH_NAMES[setup.dtype])
    model = LatteTransformer3DModel.from_pretrained(setup.checkpoint, subfolder="transformer", torch_dtype=dtype)
    model = model.eval().to(setup.device)
    forward = torch.compile(model) if compiled else model
    config, here = model.config, {"device": setup.device, "dtype": dtype}
    shape = (config.in_channels, config.video_length, config.sample_size, config.sample_size)
    latents = torch.randn(ROWS, *shape, **here)
    text = torch.randn(ROWS, TEXT_TOKENS, config.caption_channels, **here)
    timestep = torch.tensor([500] * ROWS, device=setup.device)

    def step() -> None:
        with torch.no_grad():
            forward(latents, timestep, text, return_dict=False)
        if setup.device != "cpu":
            torch.cuda.synchronize(setup.device)

    return _warmed_up(step)


def blocks_step(setup: Setup, backend_name: str, cuda_graphs: bool) -> Step:
    """Prologue, blocks and epilogue of the bundle, as the runtime calls them."""
    opened = open_bundle(setup.bundle)
    manifest = opened.manifest
    backend = create_backend(backend_name, setup.device, setup.threads, cuda_graphs)
    parts = (manifest.prologue, *manifest.blocks, manifest.epilogue)
    prologue, *blocks, epilogue = [backend.load(opened, part) for part in parts]
    tensors = random_tensors(backend.arrays, manifest, parts)
    with backend.arrays.active():
        layout, everything = Layout(fixed=cuda_graphs), (True,) * len(blocks)
        cache = create_cache(layout, manifest, backend.arrays, ROWS, everything)

    def run() -> None:
        prologue.run({**tensors, **cache.enter()})
        for index, block in enumerate(blocks):
            stream, _ = cache.bind(index)
            block.run({**tensors, **stream})
            cache.commit(index)
        epilogue.run({**tensors, **cache.stream})

    return _warmed_up(_synchronised(backend.arrays, run))


def graph_step(setup: Setup, backend_name: str, cuda_graphs: bool) -> Step:
    """The whole transformer as one graph."""
    manifest = open_bundle(setup.bundle).manifest
    part = whole_part(manifest)
    backend = create_backend(backend_name, setup.device, setup.threads, cuda_graphs)
    engine = _load_whole(setup, backend, part)
    tensors = random_tensors(backend.arrays, manifest, (part,))
    return _warmed_up(_synchronised(backend.arrays, lambda: engine.run(tensors)))


def _load_whole(setup: Setup, backend: Backend, part: Part) -> Engine:
    from foresight.engines.onnxruntime import OnnxRuntimeBackend
    from foresight.engines.tensorrt import TensorRTBackend

    if isinstance(backend, TensorRTBackend):
        return backend.load_plan(plan_path(setup, backend.name).read_bytes(), part)
    assert isinstance(backend, OnnxRuntimeBackend)
    return backend.load_graph(setup.graph, part)


def request_sizes(manifest: Manifest) -> dict[str, int]:
    """The named dimensions of the request that is measured."""
    return {name: high for name, (_, high) in manifest.ranges.items()} | {"batch": ROWS, "text": TEXT_TOKENS}


def random_tensors(arrays: Arrays, manifest: Manifest, parts: Sequence[Part]) -> dict[str, Array]:
    """An array for every input and output of `parts`, but for the stream and its caches."""
    generator, sizes = np.random.default_rng(0), request_sizes(manifest)
    streams = {f"{prefix}{name}" for name in manifest.streams for prefix in ("", "cached_", "new_")}
    specs = {spec.name: spec for part in parts for spec in (*part.inputs, *part.outputs) if spec.name not in streams}
    with arrays.active():
        return {
            name: arrays.from_host(
                generator.standard_normal(spec.resolve(sizes), dtype=np.float32).astype(numpy_dtype(spec.dtype))
            )
            for name, spec in specs.items()
        }


def _synchronised(arrays: Arrays, run: Step) -> Step:
    def step() -> None:
        with arrays.active():
            run()
            arrays.synchronize()

    return step


def _warmed_up(step: Step) -> Step:
    for _ in range(WARM_UP):
        step()
    return step


def requests(setup: Setup, backend: str, cuda_graphs: bool, rounds: int, steps: int) -> dict[str, Any]:
    """Requests with and without reuse: efficiency, the host's time, and memory. Alone on the device, or nearly."""
    arrays = create_arrays(setup.device)
    before = _used_bytes(arrays)
    pipeline = load(setup.bundle, backend=backend, device=setup.device, threads=setup.threads, cuda_graphs=cuda_graphs)
    loaded = _used_bytes(arrays)
    traces = take_turns(pipeline, policies_of("output"), rounds, steps)
    taken, trace = _used_bytes(arrays) - before, traces["none"][-1]
    kept = ("blocks_computed", "blocks_possible", "denoise_ms", "speedup", "efficiency")
    return {
        "skipping": {policy: {name: row[name] for name in kept} for policy, row in compare(traces).items()},
        "host": {policy: host_time(own) for policy, own in traces.items()},
        "memory": {
            "planned_mib": _mib(trace.planned_bytes),
            "arrays_mib": None if trace.device_bytes is None else _mib(trace.device_bytes),
            "loaded_mib": _mib(loaded - before),
            "taken_mib": _mib(taken),
            "taken_of_planned": round(taken / trace.planned_bytes, 3),
        },
    }


def host_time(traces: Sequence[Trace]) -> dict[str, float]:
    """Medians: a step's wall time, the host's own of it, and of that what was spent outside engines."""

    def middle(value: Callable[[Trace], float]) -> float:
        return median(value(trace) for trace in traces)

    return {
        "step_ms": middle(lambda trace: trace.denoise_ms / len(trace.steps)),
        "host_ms": middle(lambda trace: (trace.denoise_ms - trace.wait_ms) / len(trace.steps)),
        "host_share_percent": middle(lambda trace: 100 * (1 - trace.wait_ms / trace.denoise_ms)),
        "loop_ms": middle(lambda trace: (trace.denoise_ms - trace.wait_ms - trace.engine_ms) / len(trace.steps)),
    }


def _used_bytes(arrays: Arrays) -> int:
    """What is taken of the device's memory, by whomever; on a CPU, the most that this process has had."""
    if arrays.kind == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with arrays.active():
        free, total = arrays.xp.cuda.runtime.memGetInfo()
    return int(total - free)


def _mib(size: int) -> float:
    return round(size / MEBI, 1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _functions(setup: Setup, candidate: Candidate) -> tuple[Callable[..., Step], tuple[Any, ...]]:
    if candidate.backend == "torch":
        return torch_step, (setup, candidate.form == "compiled")
    make = blocks_step if candidate.form == "per block" else graph_step
    return make, (setup, candidate.backend, candidate.cuda_graphs)


def measure_steps(
    setup: Setup, candidates: Sequence[Candidate], rounds: int, left_out: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Every candidate's time per step, its ratio to torch eager's, and what is computed in it."""
    times = measure({candidate.name: _functions(setup, candidate) for candidate in candidates}, rounds, left_out)
    size = size_of(setup)
    rows = {}
    for name, values in times.items():
        row = {"step_ms": median(1e3 * value for value in values)}
        if eager := times.get(EAGER.name):
            row["ratio_to_eager"] = median(value / other for value, other in zip(values, eager, strict=True))
        if size:
            row["tflops"] = float(f"{2e-12 * multiply_adds(**size) / median(values):.3g}")
        rows[name] = row
    return rows


def size_of(setup: Setup) -> dict[str, int]:
    """Of the model and its video; nothing where there is no bundle."""
    if not (setup.bundle / MANIFEST).exists():
        return {}
    manifest = open_bundle(setup.bundle).manifest
    tokens, dim = manifest.ranges["tokens"][1], manifest.blocks[0].output("new_hidden").shape[-1]
    assert isinstance(dim, int)
    return {"pairs": len(manifest.blocks) // 2, "frames": manifest.shape.frames, "tokens": tokens, "dim": dim}


def measure_requests(
    setup: Setup, candidates: Sequence[Candidate], rounds: int, steps: int, left_out: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Skipping, host time and memory of every candidate that runs bundles."""
    results = {}
    for candidate in candidates:
        if candidate.form == "per block":
            started = time.perf_counter()
            try:
                results[candidate.name] = apart(
                    requests, setup, candidate.backend, candidate.cuda_graphs, rounds, steps
                )
            except Unavailable as error:
                left_out[f"requests, {candidate.name}"] = str(error)
            _say(f"requests, {candidate.name}: {time.perf_counter() - started:.0f} s")
    return results


def print_steps(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of step times."""
    cells = [
        (name, *(row.get(key, "") for key in ("step_ms", "ratio_to_eager", "tflops"))) for name, row in rows.items()
    ]
    print(table(cells, ("one step without reuse", "ms", "of eager", "TFLOP/s")), end="\n\n", flush=True)


def print_requests(results: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables of skipping, host time and memory."""
    for topic in ("skipping", "host", "memory"):
        found = {name: result[topic] for name, result in results.items() if topic in result}
        if topic == "memory":
            rows = [(name, *row.values()) for name, row in found.items()]
            header = ["memory", *next(iter(found.values()), {})]
        else:
            rows = [(name, policy, *row.values()) for name, own in found.items() for policy, row in own.items()]
            header = [topic, "policy", *next((row for own in found.values() for row in own.values()), {})]
        if rows:
            print(table(rows, header), end="\n\n", flush=True)


def setup_of(options: argparse.Namespace) -> Setup:
    """Where things lie: a folder for each size, dtype and opset, or for a bundle that is given."""
    if options.bundle is None:
        dtype = options.dtype or ("fp32" if options.device == "cpu" else "fp16")
        folder = options.work / options.size
        made = folder / f"{dtype}-opset-{options.opset}"
        checkpoint, bundle, opset = options.checkpoint or folder / "checkpoint", made / "bundle", options.opset
    else:
        opened = open_bundle(options.bundle)
        made = options.work / opened.id[:12]
        dtype, opset = opened.manifest.dtype, opened.manifest.opset
        checkpoint, bundle = options.checkpoint or made / "checkpoint", opened.path
    made.mkdir(parents=True, exist_ok=True)
    return Setup(options.device, dtype, opset, checkpoint, bundle, made / "one-graph" / "transformer.onnx")


def impossible_of(options: argparse.Namespace) -> dict[str, str]:
    """What the options rule out, and why."""
    reasons = {}
    if options.bundle is not None and options.checkpoint is None:
        reasons["checkpoint"] = "needs the checkpoint that --bundle was made from; name it with --checkpoint"
    if options.device == "cpu":
        for backend in COMPILING:
            reasons |= {
                f"{backend}, {form}": "runs on an NVIDIA GPU, not on a CPU" for form in ("per block", "one graph")
            }
    return reasons


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--size", choices=SIZES, default="latte-1")
    parser.add_argument("--dtype", choices=TORCH_NAMES, help="[default: fp16, on a CPU fp32]")
    parser.add_argument("--opset", type=int, default=23, help="from 23 on, attention is one operator")
    parser.add_argument("--rounds", type=int, default=9, help="steps of every candidate")
    parser.add_argument("--request-rounds", type=int, default=3, help="requests with every policy")
    parser.add_argument("--steps", type=int, default=8, help="of a request")
    parser.add_argument("--jobs", type=int, default=1, help="plans to build side by side")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="NAME", help=f"of {'; '.join(CANDIDATES)}")
    parser.add_argument("--bundle", type=Path, help="a bundle to measure instead of a random one")
    parser.add_argument("--checkpoint", type=Path, help="the checkpoint it was made from, for torch and one graph")
    parser.add_argument("--work", type=Path, default=Path("out/benchmark-gpu"), help="20 GB at real size")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu.json")
    return parser.parse_args()


def main() -> None:
    """Measure, print tables as they are ready, and end in one JSON line."""
    options = parse()
    setup = setup_of(options)
    preparation = Preparation(rules_of(setup, SIZES[options.size], options.jobs), impossible_of(options))
    left_out: dict[str, str] = {}
    ready = []
    with suppress(Unavailable):
        preparation.obtain("device")
    for candidate in (CANDIDATES[name] for name in options.only or CANDIDATES):
        try:
            for what in needs_of(candidate):
                preparation.obtain(what)
            ready.append(candidate)
        except Unavailable as error:
            left_out[candidate.name] = str(error)
    steps = measure_steps(setup, ready, options.rounds, left_out)
    print_steps(steps)
    results = measure_requests(setup, ready, options.request_rounds, options.steps, left_out)
    if options.device == "cpu":
        for result in results.values():
            del result["host"], result["memory"]
        left_out["host"] = "on a CPU engines run on the host itself, so all time is its own"
        left_out["memory"] = "on a CPU it is not told apart from the process's own"
    print_requests(results)
    print("\n".join(f"left out: {name}: {reason}" for name, reason in left_out.items()), flush=True)
    built = {what: found for what, found in preparation.facts.items() if what.startswith(COMPILING)}
    document = {
        "device": setup.device,
        "dtype": setup.dtype,
        "opset": setup.opset,
        "size": size_of(setup) | {"rows": ROWS, "text": TEXT_TOKENS},
        "built": built,
        "rounds": options.rounds,
        "step": steps,
        "request": {"rounds": options.request_rounds, "steps": options.steps},
        "requests": results,
        "left_out": left_out,
    }
    finish("gpu", document, options.save, preparation.facts.get("device") or driver_facts())


if __name__ == "__main__":
    main()
