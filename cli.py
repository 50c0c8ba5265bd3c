"""The command line: a thin face on exporter, engines and runtime, and the only module that prints.

Results go to stdout (with --json as one JSON document), everything else to stderr. Exit codes: 0 done, 1 failed,
2 usage, 3 bundle or engine missing or incompatible, 4 integrity, 130 interrupted, 143 terminated. Where the reader of
stdout goes away, as `head` does, the command ends with 1 and says nothing.
"""

from __future__ import annotations

import os
import sys

try:
    import json
    import logging
    import math
    import traceback
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import contextmanager, suppress
    from dataclasses import dataclass, field, replace
    from pathlib import Path
    from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

    import click
    from click.core import ParameterSource

    import foresight
    from foresight.commands.interrupt import Interrupted, Interrupts
    from foresight.commands.progress import displayed
    from foresight.engines.errors import ForesightError, InvalidRequest, OutputError
    from foresight.engines.progress import OnProgress, Progress
except ModuleNotFoundError as missing:  # run from a clone, by a Python that nothing was installed into
    _python = Path(__file__).resolve().parent / ".venv" / "bin" / "python"
    if __name__ == "__main__" and _python.exists() and Path(sys.prefix) != _python.parents[1]:
        os.execv(_python, [str(_python), *sys.argv])  # the one that make installed everything into
    sys.exit(f"{missing.name} is not installed; run: pip install -e '.[export,video,report]' -c constraints.txt")
except KeyboardInterrupt:
    sys.stderr.write("error: interrupted\n")
    sys.exit(130)

if TYPE_CHECKING:
    from foresight.commands.outputs import Targets
    from foresight.engines.bundle import Bundle
    from foresight.engines.compiled import Compiled
    from foresight.engines.tensorrt.compiler import BuildSettings
    from foresight.evaluation.comparison import Comparison
    from foresight.runtime.pipeline import VideoPipeline
    from foresight.runtime.policies import Policy
    from foresight.runtime.video import Video

Command = TypeVar("Command", bound=Callable[..., Any])
Row = dict[str, Any]  # of one video, as --json shows it
MEBI = 2**20
HELP = {"-h", "--help", "--version"}


@dataclass(frozen=True)
class Session:
    """What the commands share: the rows of finished videos, which an error reports too, and the signals that came."""

    finished: list[Row] = field(default_factory=list)
    interrupts: Interrupts = field(default_factory=Interrupts)


class Group(click.Group):
    """Commands whose interruption click does not answer with a line of its own."""

    def invoke(self, context: click.Context) -> Any:
        """Raises Interrupted instead of KeyboardInterrupt."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            raise Interrupted from error


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    session, is_process = Session(), sys._getframe(1).f_globals.get("__name__") == "__main__"
    try:
        session.interrupts.install()
        code = _run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"], session)
    except KeyboardInterrupt:  # just before its work began, or just after it was done
        session.interrupts.ending()
        code, message = session.interrupts.end
        click.echo(f"error: {message}", err=True)
    finally:
        if not is_process:  # else what comes while the interpreter ends is answered too
            session.interrupts.restore()
    sys.exit(code)


def _run(arguments: list[str], session: Session) -> int:
    """Run a command and report its error, if it ends with one; returns the exit code."""
    try:
        code: int | None = cli.main(args=arguments, prog_name="foresight", standalone_mode=False, obj=session)
        session.interrupts.check()  # something may have swallowed it
        session.interrupts.ending()
        return code or 0  # None, or an Exit's code
    except BaseException as error:  # noqa: BLE001 - raised again where it is a mistake of ours
        session.interrupts.ending()
        code, message, failure = _explain(error, arguments, session.interrupts)
    if "--debug" in arguments:
        traceback.print_exception(failure)
    if "--json" in arguments:
        told = {"type": type(failure).__name__, "message": message, "exit_code": code}
        with suppress(OutputError, click.exceptions.Exit):  # the line on stderr and the exit code say more
            _echo(json.dumps({"error": told, "finished": session.finished} if session.finished else {"error": told}))
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _explain(error: BaseException, arguments: list[str], interrupts: Interrupts) -> tuple[int, str, BaseException]:
    """Exit code, message, and the error that they are of. Raises what is nobody's mistake but ours."""
    if interrupts.came is not None or isinstance(error, (KeyboardInterrupt, Interrupted, click.Abort)):
        return *interrupts.end, KeyboardInterrupt() if isinstance(error, Interrupted) else error
    if isinstance(error, ForesightError):
        return error.exit_code, str(error), error
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message(), error
    if isinstance(error, OSError) and not HELP.isdisjoint(arguments):  # help is printed by click, all else by _echo
        failure = _stdout_error(error)
        return failure.exit_code, str(failure), failure
    raise error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(foresight.__version__, prog_name="foresight")
def cli() -> None:
    """Text-to-video diffusion transformers, compiled block by block; blocks that would not change are not run."""


def common(command: Command) -> Command:
    """The options that every command has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("--verbose", is_flag=True, help="Log what is being done, on stderr."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    ):
        command = option(command)
    return command


def bundle_argument(command: Command) -> Command:
    """A bundle's folder; without one, the newest under bundles/."""
    return click.argument("bundle", required=False, type=click.Path(path_type=Path))(command)


@cli.command()
@click.option(
    "--model",
    required=True,
    help="latte, cogvideox-2b, cogvideox-5b or open-sora; in a clone also latte-demo, cogvideox-demo, open-sora-demo.",
)
@click.option("--checkpoint", help="A diffusers folder, a hub id or its page's address, instead of the model's own.")
@click.option("--revision", help="Branch, tag or commit of a checkpoint on the hub.  [default: main]")
@click.option("--variant", help="Read model.VARIANT.safetensors, fp16 say, of components that have it.")
@click.option("--output", type=click.Path(path_type=Path), help="The bundle to write.  [default: bundles/MODEL]")
@click.option(
    "--dtype", default="fp32", show_default=True, help="fp32, fp16 or bf16 (GPUs only); the reuse metric stays fp32."
)
@click.option("--height", type=int, help="Pixels.  [default: the checkpoint's]")
@click.option("--width", type=int, help="Pixels.  [default: the checkpoint's]")
@click.option("--frames", type=int, help="[default: the checkpoint's]")
@click.option("--resolution", help="Open-Sora: 144p to 720p, instead of height and width.")
@click.option("--aspect", help="Open-Sora: height to width, such as 9:16.  [default: 9:16]")
@click.option("--duration", help="Open-Sora: 2s, 4s, 8s or 16s, instead of frames.")
@click.option("--max-batch", type=int, default=4, show_default=True, help="Most prompts in one batch.")
@click.option("--opset", type=click.IntRange(18, 23), default=23, show_default=True, help="ONNX operator set.")
@click.option("--backend", help="Compile engines too: tensorrt or tensorrt-rtx; as `build` does.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@common
def export(
    model: str,
    checkpoint: str | None,
    revision: str | None,
    variant: str | None,
    output: Path | None,
    dtype: Any,
    height: int | None,
    width: int | None,
    frames: int | None,
    resolution: str | None,
    aspect: str | None,
    duration: str | None,
    max_batch: int,
    opset: int,
    backend: str | None,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Take a checkpoint apart and write it as a bundle: one graph per block."""
    _log(verbose)
    with _progress() as show:
        show(Progress("loading torch", 0, 0, ""))
        try:
            from foresight.exporter.export import Export, ExportRequest
        except ModuleNotFoundError as error:
            raise ForesightError(f"export: {error.name} is not installed; install foresight-engines[export]") from error
    if backend is not None:
        _check_compiler(backend)
    request = ExportRequest(dtype, height, width, frames, max_batch, resolution, aspect, duration)
    job = Export(model, request, checkpoint, output, opset, revision, variant)
    plan = job.plan()
    if dry_run:
        _print(plan, as_json, _describe_plan(plan))
        return
    if backend is not None:
        _check_target(backend)
    job.fetch()  # with the progress bars of the hub's library
    with _progress() as show:
        bundle = job.run(on_progress=show)
    written = sum(record.bytes for record in bundle.manifest.files.values())
    in_grey_levels = {part.name for stage in bundle.manifest.decoder[-1:] for part in stage.parts}
    worst = max(bundle.manifest.parts, key=lambda part: 0 if part.name in in_grey_levels else part.max_difference)
    summary = {
        "bundle": str(bundle.path),
        "id": bundle.id,
        "was_up_to_date": job.was_up_to_date,
        "bytes": written,
        "blocks": len(bundle.manifest.blocks),
        "cache_bytes": plan.cache_bytes,
        "largest_difference": {"part": worst.name, "value": worst.max_difference},
        "cautions": list(bundle.manifest.cautions),
    }
    found = "is up to date: " if job.was_up_to_date else ""
    lines = [
        f"{bundle.path}: {found}{len(bundle.manifest.blocks)} blocks, {written / MEBI:.1f} MiB, {dtype}",
        f"largest difference from eager: {worst.max_difference:.2g} ({worst.name})",
        f"cache for one guided prompt: {plan.cache_bytes / MEBI:.1f} MiB",
        *map(_caution, plan.cautions),
    ]
    if backend is not None:
        compiled = _build(bundle, backend, "cuda", None, 1)
        summary["engines"] = _compiled_summary(compiled)
        lines += _describe_compiled(compiled)
    _print(summary, as_json, lines)


@cli.command()
@bundle_argument
@click.option("--backend", required=True, help="tensorrt, or tensorrt-rtx, which needs no GPU for this.")
@click.option("--device", default="cuda", show_default=True, help="tensorrt compiles for this GPU.")
@click.option("--level", type=int, default=3, show_default=True, help="Optimisation level, 0 to 5.")
@click.option("--workspace", type=int, help="Most scratch memory a part may need, MiB.  [default: all there is]")
@click.option("--jobs", type=int, default=1, show_default=True, help="Engines built side by side.")
@common
def build(
    bundle: Path | None,
    backend: str,
    device: str,
    level: int,
    workspace: int | None,
    jobs: int,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Compile a bundle's engines for this machine; goes on where it was interrupted."""
    _log(verbose)
    from foresight.engines.bundle import newest_bundle, open_bundle
    from foresight.engines.tensorrt.compiler import BuildSettings

    _check_compiler(backend)
    settings = BuildSettings(level=level, workspace_bytes=None if workspace is None else workspace * MEBI)
    compiled = _build(open_bundle(bundle or newest_bundle()), backend, device, settings, jobs)
    _print(_compiled_summary(compiled), as_json, _describe_compiled(compiled))


@cli.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="[default: the newest under bundles/]")
@click.option("--prompt", help="[default: the bundle's sample prompt]")
@click.option("--prompts", type=click.Path(path_type=Path), help="A file with one prompt a line; one video each.")
@click.option("--negative-prompt", help="[default: the bundle's]")
@click.option("--steps", type=int, help="Denoising steps, 1 to 100.  [default: the bundle's]")
@click.option("--guidance", type=float, help="1 switches it off.  [default: the bundle's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the initial noise; line i of a file adds i.")
@click.option("--policy", "policy_name", default="foresight", show_default=True, help="foresight, static or none.")
@click.option("--gamma", type=float, help="foresight: more is faster and less exact, up to 2.  [default: 0.5]")
@click.option("--warmup", type=int, help="Steps before any reuse.  [default: 15 % of all]")
@click.option("--reuse-steps", type=int, help="Steps of a cycle that may reuse.  [default: 1]")
@click.option("--interval", type=int, help="Steps of a cycle.  [default: 2]")
@click.option("--cache", help="What is cached: output or residual.  [default: output]")
@click.option("--latents", type=click.Path(path_type=Path), help="Initial noise (.npy, fp32) instead of --seed.")
@click.option("--save-latents", type=click.Path(path_type=Path), help="Write the final latents (.npy).")
@click.option("--save-frames", type=click.Path(path_type=Path), help="Write the frames (.npy, uint8, F H W 3).")
@click.option("--output", type=click.Path(path_type=Path), help=".mp4, .gif, .npy or a folder.  [default: video.mp4]")
@click.option("--report", type=click.Path(path_type=Path), help="Write a page that shows what was skipped (.html).")
@click.option("--trace", type=click.Path(path_type=Path), help="Write what every step did and measured (.json).")
@click.option("--compare", is_flag=True, help="Run without reuse too; report PSNR, SSIM and the time saved.")
@click.option(
    "--backend",
    help="onnxruntime, tensorrt or tensorrt-rtx.  [default: what the bundle has engines for here, else onnxruntime]",
)
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu for onnxruntime, else cuda]")
@click.option("--threads", type=int, help="CPU threads of each engine.  [default: the cores, up to 16]")
@click.option("--low-memory", is_flag=True, help="Load the engines of each phase when it comes, free them after it.")
@click.option("--cache-memory", type=float, help="Most memory for stream and cache, MiB.  [default: what they need]")
@click.option(
    "--cache-profile", type=click.Path(path_type=Path), help="A --trace, to choose what to cache where not all fits."
)
@click.option("--cuda-graphs", is_flag=True, help="TensorRT: record every block once, and replay it.")
@common
@click.pass_context
def run(
    context: click.Context,
    /,
    bundle: Path | None,
    prompt: str | None,
    prompts: Path | None,
    negative_prompt: str | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    policy_name: str,
    latents: Path | None,
    save_latents: Path | None,
    save_frames: Path | None,
    output: Path | None,
    report: Path | None,
    trace: Path | None,
    compare: bool,
    backend: str | None,
    device: str | None,
    threads: int | None,
    low_memory: bool,
    cache_memory: float | None,
    cache_profile: Path | None,
    cuda_graphs: bool,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **policy_flags: Any,
) -> None:
    """Make a video of a prompt, skipping the blocks that would hardly change."""
    _log(verbose)
    from foresight.commands import outputs
    from foresight.engines.bundle import newest_bundle
    from foresight.runtime.pipeline import load
    from foresight.runtime.policies import policy_from_settings

    session: Session = context.obj
    finished = session.finished
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    policy = policy_from_settings(policy_name, **policy_flags)
    if not any((output, save_latents, save_frames)):
        output = Path("video.mp4")
    texts = _read_prompts(prompt, prompts)
    targets = outputs.Targets(output, save_frames, save_latents, report, trace)
    targets.check()
    noise = outputs.read_latents(latents) if latents else None
    if cache_memory is not None and not 0 < cache_memory < math.inf:
        raise InvalidRequest(f"cache_memory: got {cache_memory} MiB, expected more than 0")
    with _progress() as show:
        pipeline = load(
            bundle or newest_bundle(),
            backend=backend,
            device=device,
            threads=threads,
            low_memory=low_memory,
            cache_memory=None if cache_memory is None else int(cache_memory * MEBI),
            cache_profile=outputs.read_trace(cache_profile) if cache_profile else None,
            cuda_graphs=cuda_graphs,
            on_progress=show,
        )
    texts = texts or [pipeline.manifest.defaults.prompt]
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance": guidance,
        "latents": noise,
    }
    if compare:  # so that neither pays for what only the first request does
        with _progress("warming up: ") as show:
            pipeline(texts[0], **{**settings, "seed": seed, "steps": 1}, on_progress=show)
    for index, text in enumerate(texts):
        request = {**settings, "seed": seed + index}
        own = targets.numbered(index, len(texts))
        finished.append(_make(pipeline, text, policy, request, own, compare, given))
        if not as_json:
            _echo("\n".join(_describe_run(finished[-1])))
    if as_json:
        _print(finished[0] if len(texts) == 1 else finished, as_json, [])


@cli.command()
@bundle_argument
@click.option("--backend", default="onnxruntime", show_default=True, help="The backend to be checked.")
@click.option("--device", help="[default: the backend's own]")
@click.option("--against", default="reference", show_default=True, help="The backend to be trusted.")
@click.option("--against-device", help="[default: that backend's own]")
@click.option("--part", "parts", multiple=True, help="Only this part, such as block.003; may be repeated.")
@click.option("--steps", type=int, default=3, show_default=True, help="Steps to run; the last one's inputs are used.")
@click.option("--tolerance", type=float, help="Of the largest value.  [default: by the bundle's dtype]")
@common
def compare(
    bundle: Path | None,
    backend: str,
    device: str | None,
    against: str,
    against_device: str | None,
    parts: tuple[str, ...],
    steps: int,
    tolerance: float | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Run every part on two backends over the same inputs, those of a real request; the worst comes first."""
    _log(verbose)
    from dataclasses import asdict

    from foresight.engines.backend import create_backend
    from foresight.engines.bundle import newest_bundle, open_bundle, verify_files
    from foresight.evaluation.parity import compare_backends

    opened = open_bundle(bundle or newest_bundle())
    with _progress() as show:
        verify_files(opened, show)
    first, second = create_backend(backend, device), create_backend(against, against_device)
    with _progress() as show:
        differences = compare_backends(
            opened, first, second, steps=steps, tolerance=tolerance, parts=parts or None,
            progress=_parts(show, "comparing"),
        )  # fmt: skip
    beyond = [difference.part for difference in differences if not difference.within]
    summary = {
        "bundle": str(opened.path),
        "backend": first.describe(),
        "against": second.describe(),
        "differences": [
            {name: None if value == math.inf else value for name, value in asdict(difference).items()}
            for difference in differences
        ],
        "beyond_tolerance": beyond,
    }
    lines = [f"{'part':14} {'kind':16} {'output':14} {'largest':>9} {'of scale':>9} {'tolerance':>9}"]
    lines += [
        f"{row.part:14} {row.kind:16} {row.output:14} {row.max_abs:9.2g} {row.relative:9.2g} {row.tolerance:9.2g}"
        f"{'' if row.within else '  beyond'}"
        for row in differences
    ]
    _print(summary, as_json, lines)
    if beyond:
        message = f"error: compare: {', '.join(beyond)} on {backend} differ from {against} by more than the tolerance"
        click.echo(message, err=True)
        raise click.exceptions.Exit(1)


@cli.command()
@bundle_argument
@common
def inspect(bundle: Path | None, as_json: bool, verbose: bool, debug: bool) -> None:
    """Show what a bundle holds, without loading any of it."""
    _log(verbose)
    import msgspec

    from foresight.engines.bundle import newest_bundle, open_bundle
    from foresight.engines.compiled import list_compiled
    from foresight.engines.manifest import part_files
    from foresight.runtime.memory import plan_memory

    opened = open_bundle(bundle or newest_bundle())
    manifest = opened.manifest
    size = sum(record.bytes for record in manifest.files.values())
    compiled_here = [compiled for compiled in list_compiled(opened) if compiled.index.bundle == opened.id]
    memory = [
        {"backend": None if compiled is None else compiled.folder.name, **plan.to_dict()}
        for compiled in (None, *compiled_here)
        for low_memory in (False, True)
        for plan in [plan_memory(manifest, low_memory=low_memory, compiled=compiled)]
    ]
    summary = {
        "bundle": str(opened.path),
        "id": opened.id,
        "bytes": size,
        "cache_bytes": {"one_prompt": manifest.cache_bytes(1), "one_prompt_guided": manifest.cache_bytes(2)},
        "memory_of_one_guided_prompt": memory,
        "manifest": msgspec.to_builtins(manifest),
    }
    shape = manifest.shape
    lines = [
        f"{opened.path}: id {opened.id[:12]}, {size / MEBI:.1f} MiB",
        f"model: {manifest.model} ({manifest.family}), {manifest.dtype}, ONNX opset {manifest.opset}",
        f"video: {shape.frames} frames of {shape.height} x {shape.width}, up to {shape.max_batch} prompts at once",
        f"cache per prompt: {manifest.cache_bytes(2) / MEBI:.1f} MiB, {manifest.cache_bytes(1) / MEBI:.1f} unguided",
        *map(_describe_memory, memory),
        f"sampler: {manifest.sampler.scheduler}, 1 to {manifest.sampler.max_steps} steps",
        f"source: {_describe_source(manifest.source)}, SHA-256 {manifest.source.sha256[:12]}",
        *map(_caution, manifest.cautions),
        "",
        f"{'part':14} {'kind':16} {'MiB':>9}  difference from eager",
    ]
    for part in manifest.parts:
        part_bytes = sum(manifest.files[name].bytes for name in part_files(part))
        lines.append(f"{part.name:14} {part.kind:16} {part_bytes / MEBI:9.2f}  {part.max_difference:.2g}")
    summary["engines"] = [_compiled_summary(compiled) for compiled in compiled_here]
    for compiled in compiled_here:
        lines += ["", *_describe_compiled(compiled)]
    _print(summary, as_json, lines)


@cli.command()
@bundle_argument
@common
def verify(bundle: Path | None, as_json: bool, verbose: bool, debug: bool) -> None:
    """Compare every file of a bundle with its manifest, and every compiled engine with its index."""
    _log(verbose)
    from foresight.engines.bundle import newest_bundle, open_bundle, verify_files
    from foresight.engines.compiled import list_compiled, verify_compiled

    opened = open_bundle(bundle or newest_bundle())
    with _progress() as show:
        verify_files(opened, show)
    engines = list_compiled(opened)
    for compiled in engines:
        verify_compiled(compiled)
    count = len(opened.manifest.files)
    summary = {
        "bundle": str(opened.path),
        "id": opened.id,
        "files": count,
        "engines": [str(compiled.folder) for compiled in engines],
        "intact": True,
    }
    lines = [f"{opened.path}: {count} files, all as the manifest says"]
    lines += [f"{compiled.folder}: {len(compiled.index.parts)} engines, all as built" for compiled in engines]
    _print(summary, as_json, lines)


@cli.command()
@common
def env(as_json: bool, verbose: bool, debug: bool) -> None:
    """Show this machine, the libraries that are installed, and what can be run."""
    _log(verbose)
    from foresight.engines.environment import describe_environment

    found = describe_environment()
    lines = [
        f"{name:22} {value if not isinstance(value, list) else ', '.join(value)}"
        for name, value in (*found["machine"].items(), *found["libraries"].items(), *found["can"].items())
    ]
    _print(found, as_json, lines)


def _check_target(backend: str) -> None:
    """Before anything is written: can this machine build for that backend at all? Raises EngineError."""
    from foresight.engines.tensorrt.library import find_target

    find_target(backend)


def _check_compiler(backend: str) -> None:
    from foresight.engines.tensorrt.library import MODULES

    if backend not in MODULES:
        raise InvalidRequest(f"backend: got {backend!r}, expected one that compiles: {', '.join(MODULES)}")


def _build(bundle: Bundle, backend: str, device: str, settings: BuildSettings | None, jobs: int) -> Compiled:
    from foresight.engines.build import build_engines

    with _progress() as show:
        return build_engines(bundle, backend, device, settings, jobs, _parts(show, "building"))


def _compiled_summary(compiled: Compiled) -> dict[str, Any]:
    index = compiled.index
    return {
        "folder": str(compiled.folder),
        "backend": index.backend,
        "target": index.target,
        "settings": index.settings,
        "plan_bytes": compiled.plan_bytes,
        "scratch_bytes": compiled.scratch_bytes,
        "parts": {
            name: {
                "plan_bytes": part.record.bytes,
                "scratch_bytes": part.scratch_bytes,
                "fused_attention": part.fused_attention,
                "build_seconds": part.build_seconds,
            }
            for name, part in sorted(index.parts.items())
        },
    }


def _describe_compiled(compiled: Compiled) -> list[str]:
    index, apart = compiled.index, compiled.taken_apart
    lines = [
        f"{compiled.folder}: {len(index.parts)} engines, {compiled.plan_bytes / MEBI:.1f} MiB",
        f"for: {', '.join(index.target.values())}",
        f"scratch: {compiled.scratch_bytes / MEBI:.1f} MiB, one buffer for all",
    ]
    if apart:
        lines.append(f"attention is not fused in {len(apart)} of them, so its scores take memory: {', '.join(apart)}")
    return lines


def _describe_memory(row: dict[str, Any]) -> str:
    name = row["backend"] or "onnxruntime"
    known = row["scratch"] is not None
    scratch = f"scratch {row['scratch'] / MEBI:.1f}, " if known else ""
    return (
        f"memory of a guided prompt, {name}{', --low-memory' if row['low_memory'] else ''}: "
        f"{row['total'] / MEBI:.1f} MiB {'at most' if known else 'and the scratch of ONNX Runtime'} "
        f"(weights {row['weights'] / MEBI:.1f}, {scratch}stream and cache {row['cache'] / MEBI:.1f})"
    )


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None and file is not None:
        raise InvalidRequest("prompt: got --prompt and --prompts, expected one of them")
    if file is None:
        if prompt is not None and not prompt.strip():
            raise InvalidRequest("prompt: got an empty text, expected some words; leave --prompt out for the sample")
        return [] if prompt is None else [prompt]
    from foresight.commands.outputs import read_prompts

    return read_prompts(file)


def _make(
    pipeline: VideoPipeline,
    text: str,
    policy: Policy,
    request: dict[str, Any],
    targets: Targets,
    compare: bool,
    given: Collection[str],
) -> Row:
    """Make and write one video; what is left of it in memory is its row."""
    from foresight.evaluation.comparison import compare_in_turns
    from foresight.runtime.notes import notes_on

    comparison = None
    if compare:
        comparison = compare_in_turns(
            lambda: _generate(pipeline, text, policy, request, "with reuse: "),
            lambda: _generate(pipeline, text, foresight.NoReuse(), request, "without reuse: "),
        )
    video = comparison.video if comparison else _generate(pipeline, text, policy, request)
    notes = notes_on(video.trace, given, draws_noise=pipeline.draws_noise(video.trace.steps_requested))
    with _progress() as show:
        written = targets.write(video, comparison.reference if comparison else None, show)
    return {
        "bundle": str(pipeline.bundle.path),
        "model": pipeline.manifest.model,
        **_run_summary(video, written),
        **({"compared": _comparison_summary(comparison)} if comparison else {}),
        "notes": [*pipeline.manifest.cautions, *notes],
    }


def _generate(pipeline: VideoPipeline, text: str, policy: Policy, request: dict[str, Any], label: str = "") -> Video:
    session: Session = click.get_current_context().obj
    with _progress(label) as show:
        video: Video = pipeline(text, policy=policy, on_progress=show, cancel=session.interrupts, **request)
    return video


def _run_summary(video: Video, written: list[Path]) -> Row:
    trace = video.trace
    summary: Row = {
        "prompt": video.prompt,
        "seed": video.seed,
        "files": [str(path) for path in written],
        "policy": trace.policy,
        "frames": list(video.frames.shape),
        "blocks_computed": trace.blocks_computed,
        "blocks_reused": trace.blocks_reused,
        "blocks_dead": trace.blocks_dead,
        "blocks_possible": trace.blocks_possible,
        "share_skipped": trace.share_skipped,
        "text_ms": trace.text_ms,
        "denoise_ms": trace.denoise_ms,
        "decode_ms": trace.decode_ms,
        "cache_bytes": trace.cache_bytes,
        "uncached": list(trace.uncached),
        "planned_bytes": trace.planned_bytes,
        "device_bytes": trace.device_bytes,
    }
    if trace.truncated_prompts:
        summary["truncated"] = True
    return summary


def _comparison_summary(comparison: Comparison) -> Row:
    decibel = comparison.psnr_db
    return {
        "denoise_ms": comparison.reference.trace.denoise_ms,
        "speedup": comparison.speedup,
        "speedups": list(comparison.speedups),
        "ceiling": comparison.ceiling if math.isfinite(comparison.ceiling) else None,
        "noisy": comparison.noisy,
        "psnr_db": decibel if math.isfinite(decibel) else None,
        "ssim": comparison.ssim,
        "identical": math.isinf(decibel),
    }


def _describe_run(row: Row) -> list[str]:
    steps = row["blocks_possible"]
    frames, height, width, _ = row["frames"]
    lines = [f"{path}" for path in row["files"]]
    lines.append(
        f"made by {row['bundle']} ({row['model']}) of {row['prompt']!r}, seed {row['seed']}: "
        f"{frames} frames of {height} x {width}"
    )
    lines.append(
        f"blocks: {row['blocks_computed']} of {steps} run, {row['blocks_reused']} reused, {row['blocks_dead']} dead "
        f"({100 * row['share_skipped']:.1f} % skipped)"
    )
    lines.append(
        f"time: text {row['text_ms']:.0f} ms, denoising {row['denoise_ms']:.0f} ms, "
        f"decoding {row['decode_ms']:.0f} ms; cache {row['cache_bytes'] / MEBI:.1f} MiB"
    )
    if row["uncached"]:
        lines.append(f"no room to cache, so always run: {', '.join(row['uncached'])}")
    if "compared" in row:
        lines += _describe_comparison(row["compared"])
    return lines + [f"note: {note}" for note in row["notes"]]


def _describe_comparison(row: Row) -> list[str]:
    pairs, ceiling = row["speedups"], row["ceiling"]
    quality = "identical" if row["identical"] else f"PSNR {row['psnr_db']:.1f} dB, SSIM {row['ssim']:.4f}"
    spread = "one pair of runs" if len(pairs) == 1 else f"{min(pairs):.2f} to {max(pairs):.2f} in {len(pairs)} pairs"
    most = "" if ceiling is None else f"; at most {ceiling:.2f}x, by the blocks that ran"
    lines = [
        f"against no reuse ({row['denoise_ms']:.0f} ms): {row['speedup']:.2f}x as fast ({spread}{most}), {quality}"
    ]
    if row["noisy"]:
        lines.append("note: speed-up: the machine is noisy, so the times tell little; measure again when it is idle")
    return lines


def _describe_source(source: Any) -> str:
    """The checkpoint of a plan or a manifest, with its revision and variant if it has any."""
    told = [f"{name} {value}" for name in ("revision", "variant") if (value := getattr(source, name)) is not None]
    return ", ".join([source.checkpoint, *told])


def _describe_plan(plan: Any) -> list[str]:
    shape = plan.shape
    return [
        f"would write {plan.output}: {plan.model} from {_describe_source(plan)}, {plan.dtype}, opset {plan.opset}",
        f"video: {shape['frames']} frames of {shape['height']} x {shape['width']}",
        *([f"download: {plan.download_bytes / MEBI:.1f} MiB"] if plan.download_bytes else []),
        f"graphs: {len(plan.parts)}, of which {plan.blocks} blocks of {plan.kinds} kinds",
        f"size: {plan.bundle_bytes / MEBI:.1f} MiB of weights ({plan.free_disk_bytes / MEBI:.0f} MiB free)",
        f"cache for one guided prompt: {plan.cache_bytes / MEBI:.1f} MiB",
        *map(_caution, plan.cautions),
    ]


def _caution(text: str) -> str:
    return f"caution: {text}"


def _print(document: Any, as_json: bool, lines: Sequence[str]) -> None:
    if as_json:
        from dataclasses import asdict, is_dataclass

        plain = asdict(document) if is_dataclass(document) and not isinstance(document, type) else document
        _echo(json.dumps(plain, indent=1, allow_nan=False))
    else:
        _echo("\n".join(lines))


def _echo(text: str) -> None:
    """Print a result. Raises OutputError, or Exit where nobody reads it any more."""
    try:
        click.echo(text)
    except OSError as error:
        failure = _stdout_error(error)
        raise click.exceptions.Exit(1) if isinstance(error, BrokenPipeError) else failure from error


def _stdout_error(error: OSError) -> OutputError:
    """What to raise after stdout has failed; nothing is written to it any more."""
    with suppress(OSError):  # Python would try once more at its end, and complain, as what was not written is kept
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputError(
        f"stdout: {error.strerror or error}; send it to where it can be written; files that were written are kept"
    )


@contextmanager
def _progress(label: str = "") -> Iterator[OnProgress]:
    """What shows progress on stderr, with `label` before each phase, while the block runs."""
    session: Session = click.get_current_context().obj
    with displayed() as display:

        def show(progress: Progress) -> None:
            session.interrupts.check()
            display(replace(progress, phase=label + progress.phase) if label else progress)

        yield show


def _parts(show: OnProgress, phase: str) -> Callable[[int, int, str], None]:
    """Shows the parts that are done, and the one that comes next."""

    def tell(done: int, total: int, name: str) -> None:
        show(Progress(phase, done, total, "parts", name))

    return tell


def _log(verbose: bool) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("foresight").setLevel(logging.INFO if verbose else logging.WARNING)


if __name__ == "__main__":
    main()
