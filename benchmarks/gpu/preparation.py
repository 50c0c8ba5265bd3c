"""What has to be made before anything can be measured, each thing once and in a process of its own.

Making something may need what is not installed, or more memory than there is. Then whatever needs it is left out of
the measurement, with the reason.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import reason_of
from benchmarks.gpu.models import write_checkpoint
from benchmarks.gpu.setup import BACKENDS, COMPILING, Setup
from benchmarks.step_time import CRASHED
from foresight.engines.arrays import MEBI, gpu_facts
from foresight.engines.bundle import MANIFEST, open_bundle
from foresight.engines.errors import EngineError


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
        say(f"{what}: {time.perf_counter() - started:.0f} s")


def rules_of(setup: Setup, small: bool, jobs: int) -> dict[str, Rule]:
    """How to make everything that candidates need."""
    rules = {
        "torch": Rule((), check_torch, (setup.device,)),
        "device": Rule((), device_facts, (setup.device,)),
        "checkpoint": Rule((), make_checkpoint, (setup, small), setup.checkpoint),
        "bundle": Rule(("checkpoint",), export_bundle, (setup,), setup.bundle / MANIFEST),
        "graph": Rule(("checkpoint", "bundle"), export_graph, (setup,), setup.graph),
        "flops": Rule(("bundle", "checkpoint"), flops_of, (setup,)),
        **{backend: Rule(("device",), check_backend, (backend, setup.device)) for backend in BACKENDS},
    }
    for backend in COMPILING:
        rules[f"{backend}, per block"] = Rule((backend, "bundle"), build_blocks, (setup, backend, jobs))
        rules[f"{backend}, one graph"] = Rule((backend, "graph"), build_graph, (setup, backend))
    return rules


def check_torch(device: str) -> None:
    """Fail where torch or diffusers is missing, or torch cannot use the device."""
    import diffusers
    import torch

    assert diffusers.__version__
    torch.zeros(1, device=device)


def check_backend(backend: str, device: str) -> None:
    """Fail where a backend cannot use the device. Raises EngineError.

    Call it in a process of its own, which a broken driver may take down. That its library is installed, and the GPU
    usable, does not mean that the one knows the other: so it has to load the smallest of plans.
    """
    from foresight.engines.backend import create_backend
    from foresight.engines.registry import COMPILERS
    from foresight.engines.tensorrt.library import probe

    create_backend(backend, device)
    runs = probe(backend)["runs engines"] if backend in COMPILERS else "yes"
    if runs != "yes":
        raise EngineError(f"{backend}: runs no engines on this GPU ({runs}); leave it out, or use a GPU that it knows")


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


def make_checkpoint(setup: Setup, small: bool) -> None:
    """Write a random checkpoint."""
    partial = _fresh(setup.checkpoint)
    write_checkpoint(setup.model, small, partial)
    os.rename(partial, setup.checkpoint)


def export_bundle(setup: Setup) -> None:
    """Export the checkpoint, one graph per block."""
    setup.export().run()


def export_graph(setup: Setup) -> None:
    """Export the transformer as one graph."""
    from benchmarks.gpu.transformer import write_transformer

    export, partial = setup.export(), _fresh(setup.graph.parent)
    partial.mkdir(parents=True)
    write_transformer(export.split, export.checkpoint, setup.sizes, setup.opset, partial / setup.graph.name)
    os.rename(partial, setup.graph.parent)


def _fresh(folder: Path) -> Path:
    """Where to write what will be renamed to `folder` when it is whole; what an earlier run left there is gone."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def flops_of(setup: Setup) -> int:
    """Floating-point operations of one step."""
    from benchmarks.gpu.transformer import count_flops

    return count_flops(setup.export().split, setup.sizes)


def build_blocks(setup: Setup, backend: str, jobs: int) -> dict[str, Any]:
    """Build the plans of all parts, or find them; returns what it took."""
    from foresight.engines.build import build_engines

    compiled = build_engines(open_bundle(setup.bundle), backend, setup.device, jobs=jobs)
    parts = compiled.index.parts.values()
    return {
        "seconds": round(sum(part.build_seconds for part in parts), 1),
        "plans_mib": mib(compiled.plan_bytes),
        "scratch_mib": mib(compiled.scratch_bytes),
        "attention_not_fused_in": len(compiled.taken_apart),
    }


def build_graph(setup: Setup, backend: str) -> dict[str, Any]:
    """Build the plan of the whole transformer, or find it; returns what it took."""
    from foresight.engines.build import build_apart
    from foresight.engines.tensorrt.compiler import BuildSettings, shape_ranges

    path = setup.plan_path(backend)
    facts = path.with_suffix(".json")
    if not facts.exists():
        shapes = shape_ranges(setup.transformer, setup.manifest.ranges)
        plan = build_apart(backend, setup.graph, shapes, BuildSettings(), device=setup.device)
        path.write_bytes(plan.data)
        made = {
            "seconds": plan.seconds,
            "plans_mib": mib(len(plan.data)),
            "scratch_mib": mib(plan.scratch_bytes),
            "attention_not_fused_in": int(plan.fused_attention is False),
        }
        facts.write_text(json.dumps(made), encoding="utf-8")
    found: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return found


def mib(size: int) -> float:
    """Bytes in MiB, to a tenth."""
    return round(size / MEBI, 1)


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)
