"""The options that say how a bundle is loaded, for the commands that run one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engines.errors import InvalidRequest
from ..engines.registry import REGISTRY
from ..engines.wording import MEBI
from .completion import names
from .console import progress
from .options import PATH, Command, group

if TYPE_CHECKING:
    from ..runtime.pipeline import VideoPipeline
    from ..serving.settings import WorkerSettings


@dataclass(frozen=True)
class Engines:
    """The backend, and what its engines may take."""

    backend: str | None
    device: str | None
    threads: int | None
    low_memory: bool
    cache_memory: float | None
    cache_profile: Path | None
    cuda_graphs: bool
    split_guidance: bool

    def load(self, bundle: Path | None) -> VideoPipeline:
        """The pipeline of a bundle, or of the newest one."""
        from ..engines.bundle import newest_bundle
        from ..runtime.pipeline import load
        from .outputs import read_trace

        cache_memory = self.cache_bytes()
        with progress() as show:
            return load(
                bundle or newest_bundle(),
                backend=self.backend,
                device=self.device,
                threads=self.threads,
                low_memory=self.low_memory,
                cache_memory=cache_memory,
                cache_profile=read_trace(self.cache_profile) if self.cache_profile else None,
                cuda_graphs=self.cuda_graphs,
                split_guidance=self.split_guidance,
                on_progress=show,
            )

    def cache_bytes(self) -> int | None:
        """Most memory for stream and cache; None where there is no limit. Raises InvalidRequest."""
        megabytes = self.cache_memory
        if megabytes is not None and not 0 < megabytes < math.inf:
            raise InvalidRequest(f"cache_memory: got {megabytes} MiB, expected more than 0")
        return None if megabytes is None else int(megabytes * MEBI)

    def worker(self, bundles: Mapping[str, Path], signed_by: Iterable[Path] = ()) -> WorkerSettings:
        """What other processes load these bundles with. Raises InvalidRequest."""
        from ..engines.signatures import read_public_keys
        from ..serving.settings import WorkerSettings

        if self.cache_profile is not None:
            raise InvalidRequest("cache_profile: got one, expected none: requests that come are not all alike")
        return WorkerSettings(
            bundles=bundles,
            backend=self.backend,
            device=self.device,
            threads=self.threads,
            low_memory=self.low_memory,
            cache_memory=self.cache_bytes(),
            cuda_graphs=self.cuda_graphs,
            split_guidance=self.split_guidance,
            signed_by=read_public_keys(tuple(signed_by) or None),
        )


def engine_options(command: Command) -> Command:
    """The options of `Engines`; the command is given `engines`."""
    return group(
        "engines",
        Engines,
        click.option(
            "--backend",
            shell_complete=names(REGISTRY),
            help="onnxruntime, openvino, tensorrt or tensorrt-rtx.  [default: what the bundle has engines for here, "
            "else onnxruntime]",
        ),
        click.option(
            "--device",
            help="cpu, cuda or cuda:N; gpu for openvino.  [default: cpu for onnxruntime and openvino, else cuda]",
        ),
        click.option("--threads", type=int, help="CPU threads of each engine.  [default: the cores, up to 16]"),
        click.option(
            "--low-memory", is_flag=True, help="Load the engines of each phase when it comes, free them after it."
        ),
        click.option(
            "--cache-memory", type=float, help="Most memory for stream and cache, MiB.  [default: what they need]"
        ),
        click.option("--cache-profile", type=PATH, help="A --trace, to choose what to cache where not all fits."),
        click.option("--cuda-graphs", is_flag=True, help="TensorRT: record every block once, and replay it."),
        click.option("--split-guidance", is_flag=True, help="One half of a guided batch at a time: half the scratch."),
    )(command)
