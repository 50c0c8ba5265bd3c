"""One step without reuse, in every way there is to run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.common import median
from benchmarks.gpu.setup import BACKENDS, COMPILING, Setup
from benchmarks.step_time import Function, Runner, Step
from foresight.engines.arrays import Array, Arrays, numpy_dtype
from foresight.engines.backend import Backend, Engine, create_backend
from foresight.engines.bundle import open_bundle
from foresight.engines.manifest import Part
from foresight.runtime.caches import Layout, create_caches, find_mode

# A block meets its last set of addresses in its third step, and CUDA graphs record a set when it comes again.
WARM_UP = 6
# Seconds of torch eager's step, where it runs, and of a candidate's next to it.
Turn = tuple[float | None, float]


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

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be there for it, by the names of `preparation.rules_of`; first what takes no time to find out."""
        if self.backend == "torch":
            return "torch", "checkpoint", "bundle"
        plans = (f"{self.backend}, {self.form}",) if self.backend in COMPILING else ()
        return "device", self.backend, *plans, "bundle", *(("graph",) if self.form == "one graph" else ())


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


def torch_step(setup: Setup, compiled: bool) -> Step:
    """One forward of the model's own transformer."""
    import torch

    from benchmarks.gpu.originals import load_original

    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    original = load_original(setup.checkpoint, setup.manifest, setup.sizes, setup.device)
    forward = torch.compile(original.module) if compiled else original.module

    def step() -> None:
        with torch.no_grad():
            forward(**original.arguments)
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
    tensors = random_tensors(backend.arrays, setup, parts)
    with backend.arrays.active():
        layout, everything = Layout(find_mode("output"), fixed=cuda_graphs), (True,) * len(blocks)
        (cache,) = create_caches(layout, manifest, backend.arrays, setup.sizes["batch"], everything)

    def run() -> None:
        prologue.run({**tensors, **cache.enter(0)})
        for index, block in enumerate(blocks):
            stream, _ = cache.bind(index)
            block.run({**tensors, **stream})
            cache.commit(index)
        epilogue.run({**tensors, **cache.stream})

    return _warmed_up(_synchronised(backend.arrays, run))


def graph_step(setup: Setup, backend_name: str, cuda_graphs: bool) -> Step:
    """The whole transformer as one graph."""
    part = setup.transformer
    backend = create_backend(backend_name, setup.device, setup.threads, cuda_graphs)
    engine = load_whole(setup, backend, part)
    tensors = random_tensors(backend.arrays, setup, (part,))
    return _warmed_up(_synchronised(backend.arrays, lambda: engine.run(tensors)))


def load_whole(setup: Setup, backend: Backend, part: Part) -> Engine:
    """The engine of the whole transformer, which lies in no bundle. Raises EngineError."""
    from foresight.engines.onnxruntime import OnnxRuntimeBackend
    from foresight.engines.tensorrt.backend import TensorRTBackend

    if isinstance(backend, TensorRTBackend):
        return backend.load_plan(setup.plan_path(backend.name).read_bytes(), part)
    assert isinstance(backend, OnnxRuntimeBackend)
    return backend.load_graph(setup.graph, part)


def random_tensors(arrays: Arrays, setup: Setup, parts: Sequence[Part]) -> dict[str, Array]:
    """An array for every input and output of `parts`, but for the streams and their caches."""
    generator, sizes = np.random.default_rng(0), setup.sizes
    streams = {f"{state}{name}" for name in setup.manifest.streams for state in ("", "cached_", "new_")}
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


def function_of(setup: Setup, candidate: Candidate) -> Function:
    """What makes the candidate's step."""
    if candidate.backend == "torch":
        return torch_step, (setup, candidate.form == "compiled")
    make = blocks_step if candidate.form == "per block" else graph_step
    return make, (setup, candidate.backend, candidate.cuda_graphs)


def measure_in_pairs(functions: Mapping[str, Function], rounds: int, left_out: dict[str, str]) -> dict[str, list[Turn]]:
    """Every candidate takes turns with torch eager, and has ended before the next one is loaded.

    So two at most are on the device, where all of them would not fit. What fails goes into `left_out` with the reason;
    without torch eager, or when it has failed, the others go on alone.
    """
    eager = Runner(functions[EAGER.name]) if EAGER.name in functions else None
    turns = {}
    for name, function in functions.items():
        runner = eager if eager is not None and name == EAGER.name else Runner(function)
        turns[name] = _take_turns(eager, runner, rounds)
        if runner is not eager:
            runner.stop()
        if runner.reason is not None:
            left_out[name] = runner.reason
            del turns[name]
    if eager is not None:
        eager.stop()
        if eager.reason is not None:
            left_out[EAGER.name] = eager.reason
    return turns


def _take_turns(eager: Runner | None, runner: Runner, rounds: int) -> list[Turn]:
    turns: list[Turn] = []
    for _ in range(rounds):
        before = None if eager is None or runner.reason is not None else eager.step()
        seconds = before if runner is eager else runner.step()
        if seconds is not None:
            turns.append((before, seconds))
    return turns


def measure_steps(
    setup: Setup, candidates: Sequence[Candidate], rounds: int, left_out: dict[str, str], flops: int | None
) -> dict[str, dict[str, float]]:
    """Every candidate's time per step, its ratio to torch eager's, and what is computed in it."""
    functions = {candidate.name: function_of(setup, candidate) for candidate in candidates}
    return {name: row_of(turns, flops) for name, turns in measure_in_pairs(functions, rounds, left_out).items()}


def row_of(turns: Sequence[Turn], flops: int | None) -> dict[str, float]:
    """The medians of a candidate's turns."""
    seconds = median(own for _, own in turns)
    row = {"step_ms": median(1e3 * own for _, own in turns)}
    if ratios := [own / eager for eager, own in turns if eager is not None]:
        row["ratio_to_eager"] = median(ratios)
    if flops is not None:
        row["tflops"] = float(f"{1e-12 * flops / seconds:.3g}")
    return row
