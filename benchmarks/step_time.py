"""One denoising step without reuse: ONNX Runtime, in several settings, and OpenVINO, against torch, in fp32 and bf16.

Every candidate lives in a process of its own, so that thread pools and allocators do not disturb each other; the
processes wait on a pipe while it is another's turn, and take turns round by round. What is timed is the transformer
alone, a guided batch of two rows: `LatteTransformer3DModel.forward` for torch, prologue, blocks and epilogue for the
engines, called as the runtime calls them. All are given the same inputs; PSNR is that of a step's output against torch
eager's in fp32. Theory: the multiply-adds of a step, to see what share of the processor is used. Processor time is what
a step took of it in all threads, those that spin while they wait included; it does not count what others took.

    python -m benchmarks.step_time --save
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import finish, median, reason_of, table

SIZE = {"heads": 6, "head_dim": 64, "pairs": 8, "frames": 8, "sample_size": 32}
ROWS = 2
TEXT_TOKENS = 16
EAGER, EAGER_BF16 = "torch eager", "torch eager, bf16"
CRASHED = "its process crashed"

Step = Callable[[], Any]  # returns its output, (rows, …) fp32, where that is compared
# What makes a step in the process it is called in, and its arguments.
Function = tuple[Callable[..., Step], tuple[Any, ...]]


def draw_inputs(caption_channels: int) -> dict[str, Any]:
    """What every candidate is given: latents, text states and timestep, fp32."""
    generator, size = np.random.default_rng(0), SIZE["sample_size"]
    return {
        "latents": generator.standard_normal((ROWS, 4, SIZE["frames"], size, size), dtype=np.float32),
        "text_states": generator.standard_normal((ROWS, TEXT_TOKENS, caption_channels), dtype=np.float32),
        "timestep": np.full(ROWS, 500, np.float32),
    }


def torch_step(checkpoint: Path, threads: int, compiled: bool, dtype: str = "float32") -> Step:
    """One forward of the diffusers transformer; timesteps are embedded in fp32, as diffusers does it."""
    import torch
    from diffusers import LatteTransformer3DModel

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    model = LatteTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", torch_dtype=kind).eval()
    forward = torch.compile(model) if compiled else model
    given = {name: torch.from_numpy(values) for name, values in draw_inputs(model.config.caption_channels).items()}
    latents, text = given["latents"].to(kind), given["text_states"].to(kind)

    def step() -> Any:
        with torch.no_grad():
            output = forward(latents, given["timestep"], text, return_dict=False)[0].float().numpy()
        return output[:, : latents.shape[1]]  # without the variance, which no sampler here reads

    return step


def onnx_runtime(threads: int, pool: str) -> Any:
    """The backend.

    `pool` is "own" for its own way, threads per session that sleep while they wait; "spinning" for threads per session
    that do not; "shared" for one pool of the process, whose threads spin as well.
    """
    import onnxruntime as ort

    from foresight.engines import onnxruntime as backend_module

    class Spinning(backend_module.OnnxRuntimeBackend):
        def _options(self, weights: Any) -> Any:
            options = super()._options(weights)
            options.add_session_config_entry("session.intra_op.allow_spinning", "1")
            return options

    backend = (backend_module.OnnxRuntimeBackend if pool == "own" else Spinning)(threads=threads)
    if pool == "shared":
        ort.set_global_thread_pool_sizes(threads, 1)
        backend._own_threads = False
    return backend


def openvino(threads: int) -> Any:
    """The backend."""
    from foresight.engines.backend import create_backend

    return create_backend("openvino", threads=threads)


def engine_step(bundle: Path, backend_of: Callable[..., Any], *arguments: Any) -> Step:
    """One step of the bundle's engines."""
    from foresight.engines.arrays import numpy_dtype
    from foresight.engines.bundle import open_bundle
    from foresight.runtime.caches import Layout, create_caches, find_mode

    backend, opened = backend_of(*arguments), open_bundle(bundle)
    manifest = opened.manifest
    parts = (manifest.condition, *manifest.experts[0].transformer)
    engines = {part.name: backend.load(opened, part) for part in parts}
    sizes = manifest.largest(batch=ROWS, text=TEXT_TOKENS)
    given = draw_inputs(int(manifest.condition.input("text_states").shape[-1]))
    given["text_mask"] = np.ones((ROWS, TEXT_TOKENS), np.int64)
    tensors: dict[str, Any] = {}
    for part in parts:
        for spec in (*part.inputs, *part.outputs):
            dtype = numpy_dtype(spec.dtype)
            tensors.setdefault(spec.name, given.get(spec.name, np.zeros(spec.resolve(sizes), dtype)).astype(dtype))
    engines["condition"].run(tensors)
    every = (True,) * len(manifest.blocks)
    (cache,) = create_caches(Layout(find_mode("output")), manifest, backend.arrays, ROWS, every)

    def step() -> Any:
        engines["prologue"].run({**tensors, **cache.enter(0)})
        for index, block in enumerate(manifest.blocks):
            stream, _ = cache.bind(index)
            engines[block.name].run({**tensors, **stream})
            cache.commit(index)
        engines["epilogue"].run({**tensors, **cache.stream})
        return tensors["model_output"]

    return step


def serve(pipe: Connection, make: Callable[..., Step], arguments: tuple[Any, ...]) -> None:
    """A candidate's process: time one step whenever asked. Where it fails, it sends the reason and ends."""
    try:
        step = make(*arguments)
        output = step()
        pipe.send("ready")
        spent: list[float] = []
        while (word := pipe.recv()) != "stop":
            if word == "result":
                pipe.send((output, spent))
                continue
            started, before = time.perf_counter(), time.process_time()
            output = step()
            spent.append(time.process_time() - before)
            pipe.send(time.perf_counter() - started)
    except Exception as error:  # noqa: BLE001 - of any library
        pipe.send(reason_of(error))


def fuse_attention(bundle: Path, target: Path) -> Path:
    """A copy of a bundle whose self-attention is ONNX Runtime's own MultiHeadAttention operator."""
    import shutil

    import msgspec
    import onnx
    from onnx import helper

    from foresight.engines.bundle import MANIFEST
    from foresight.engines.files import file_record

    shutil.copytree(bundle, target)
    document = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    for path in target.glob("block.*.onnx"):
        model = onnx.load(path, load_external_data=False)
        for node in [n for n in model.graph.node if n.op_type == "Attention" and len(n.input) == 3]:
            flat = helper.make_node(
                "MultiHeadAttention",
                [f"{name}_flat" for name in node.input],
                [f"{node.output[0]}_flat"],
                domain="com.microsoft",
                num_heads=SIZE["heads"],
            )
            _replace_attention(model, node, flat)
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        onnx.save(model, path)
        document["files"][path.name] = msgspec.to_builtins(file_record(path))
    (target / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    return target


def _replace_attention(model: Any, node: Any, flat: Any) -> None:
    """Put `flat`, on (rows, length, heads x head dim), in the place of `node`, on (rows, heads, length, head dim)."""
    from onnx import helper, numpy_helper

    dim, heads = SIZE["heads"] * SIZE["head_dim"], SIZE["heads"]
    for name, shape in (("flat_shape", [0, 0, dim]), ("heads_shape", [0, 0, heads, dim // heads])):
        if name not in {initializer.name for initializer in model.graph.initializer}:
            model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    nodes = []
    for name, flat_name in zip(node.input, flat.input, strict=True):
        nodes.append(helper.make_node("Transpose", [name], [f"{name}_moved"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"{name}_moved", "flat_shape"], [flat_name]))
    nodes.append(flat)
    nodes.append(helper.make_node("Reshape", [flat.output[0], "heads_shape"], [f"{flat.output[0]}_heads"]))
    nodes.append(helper.make_node("Transpose", [f"{flat.output[0]}_heads"], [node.output[0]], perm=[0, 2, 1, 3]))
    position = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(position + offset, new)


def multiply_adds(pairs: int, frames: int, tokens: int, dim: int) -> float:
    """Of one step's matrix products, analytically: attention and feed-forward of all blocks."""
    positions = ROWS * frames * tokens
    spatial = positions * (12 + 2) * dim**2 + 2 * positions * (tokens + TEXT_TOKENS) * dim
    spatial += 2 * ROWS * TEXT_TOKENS * dim**2
    temporal = positions * 12 * dim**2 + 2 * positions * frames * dim
    return float(pairs * (spatial + temporal))


class Runner:
    """A candidate in a process of its own, which takes a step when it is told to.

    Where it fails, `reason` says why, from the start or from some step on; it then takes no more steps.
    """

    def __init__(self, function: Function) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *function), daemon=True)
        self._process.start()
        other.close()  # now the pipe ends with the process
        answer = self._answer()
        self.reason = None if answer == "ready" else str(answer)

    def step(self) -> float | None:
        """Seconds of one step, None where it fails."""
        if self.reason is None:
            answer = self._answer("step")
            if isinstance(answer, float):
                return answer
            self.reason = answer
        return None

    def result(self) -> tuple[Any, list[float]]:
        """The output of the last step, and each step's seconds of the processor. Raises RuntimeError if it failed."""
        answer: Any = self._answer("result") if self.reason is None else self.reason
        if answer in (self.reason, CRASHED):
            raise RuntimeError(answer)
        output, spent = answer
        return output, spent

    def stop(self) -> None:
        """End the process, and wait until it is gone, and with it what it had of the device's memory."""
        with suppress(OSError):  # it is gone already
            self._pipe.send("stop")
        self._process.join()

    def _answer(self, word: str | None = None) -> Any:
        """What the process says: a time, a result, `"ready"`, or the reason why there is none."""
        try:
            if word is not None:
                self._pipe.send(word)
            return self._pipe.recv()
        except (EOFError, OSError):
            return CRASHED


@dataclass
class Measured:
    """One candidate's steps: seconds, seconds of the processor, and what the last one made."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    output: Any = None

    def ratios(self, other: Measured) -> list[float]:
        """Seconds of every step over those of another's in the same round."""
        return [own / others for own, others in zip(self.seconds, other.seconds, strict=True)]


def measure(candidates: Mapping[str, Function], rounds: int) -> dict[str, Measured]:
    """Every candidate's steps, taken in turns: A, B, C and again A, B, C. Raises RuntimeError where one fails."""
    runners = {name: Runner(function) for name, function in candidates.items()}
    measured = {name: Measured() for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            seconds = runner.step()
            if seconds is None:
                raise RuntimeError(f"{name}: {runner.reason}")
            measured[name].seconds.append(seconds)
    for name, runner in runners.items():
        measured[name].output, measured[name].processor = runner.result()
        runner.stop()
    return measured


def candidates_of(folder: Path, threads: int) -> Iterator[tuple[str, Function]]:
    """Every way to run the step that is compared, by name."""
    from foresight.exporter.export import Export
    from foresight.exporter.models.base import ExportRequest
    from zoo import latte

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        latte.write_random(checkpoint, **SIZE)  # type: ignore[arg-type]
    yield EAGER, (torch_step, (checkpoint, threads, False))
    yield EAGER_BF16, (torch_step, (checkpoint, threads, False, "bfloat16"))
    yield "torch.compile", (torch_step, (checkpoint, threads, True))
    for opset in (18, 20, 23):
        bundle = folder / f"opset-{opset}"
        Export("latte-demo", checkpoint=str(checkpoint), output=bundle, opset=opset).run()
        yield f"ONNX Runtime, opset {opset}", (engine_step, (bundle, onnx_runtime, threads, "own"))
    newest, fused, bf16 = folder / "opset-23", folder / "fused", folder / "bf16"
    if not fused.exists():
        fuse_attention(newest, fused)
    yield "opset 23, MultiHeadAttention", (engine_step, (fused, onnx_runtime, threads, "own"))
    yield "opset 23, threads that spin", (engine_step, (newest, onnx_runtime, threads, "spinning"))
    yield "opset 23, one pool for all", (engine_step, (newest, onnx_runtime, threads, "shared"))
    yield "OpenVINO", (engine_step, (newest, openvino, threads))
    Export("latte-demo", ExportRequest(dtype="bf16"), str(checkpoint), bf16).run()
    yield "OpenVINO, bf16", (engine_step, (bf16, openvino, threads))


def psnr(output: Any, expected: Any) -> float | None:
    """Of one step's output against another's, in dB; None where they are identical."""
    error = float(np.mean((output.astype(np.float64) - expected) ** 2))
    return round(float(10 * np.log10(np.ptp(expected) ** 2 / error)), 1) if error else None


def row_of(measured: Measured, eager: Measured, eager_bf16: Measured, work: float) -> dict[str, Any]:
    """What is recorded of a candidate, beside torch eager in fp32 and in bf16."""
    ratios = measured.ratios(eager)
    return {
        "step_ms": median(1e3 * value for value in measured.seconds),
        "fastest_ms": float(f"{1e3 * min(measured.seconds):.4g}"),
        "processor_ms": median(1e3 * value for value in measured.processor),
        "ratio_to_eager": median(ratios),
        "ratio_to_eager_bf16": median(measured.ratios(eager_bf16)),
        "ratio_range": [float(f"{bound:.3g}") for bound in (min(ratios), max(ratios))],
        "psnr_db": psnr(measured.output, eager.output),
        "gflops": round(2 * work / median(measured.seconds) / 1e9),
    }


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "foresight-step-time")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/step_time.json")
    options = parser.parse_args()
    tokens, dim = (SIZE["sample_size"] // 2) ** 2, SIZE["heads"] * SIZE["head_dim"]
    work = multiply_adds(SIZE["pairs"], SIZE["frames"], tokens, dim)
    results: dict[str, Any] = {}
    for threads in options.threads:
        measured = measure(dict(candidates_of(options.work, threads)), options.rounds)
        rows = {name: row_of(steps, measured[EAGER], measured[EAGER_BF16], work) for name, steps in measured.items()}
        results[str(threads)] = rows
        columns = (
            "step_ms",
            "fastest_ms",
            "processor_ms",
            "ratio_to_eager",
            "ratio_to_eager_bf16",
            "psnr_db",
            "gflops",
        )
        cells = [(name, *(row[column] for column in columns)) for name, row in rows.items()]
        header = (
            "candidate",
            "ms a step",
            "fastest",
            "of the processor",
            "of eager",
            "of eager in bf16",
            "PSNR",
            "GFLOP/s",
        )
        print(f"\n{threads} thread(s)\n" + table(cells, header))
    finish("step_time", {"size": SIZE | {"rows": ROWS, "text": TEXT_TOKENS}, "by_threads": results}, options.save)


if __name__ == "__main__":
    main()
