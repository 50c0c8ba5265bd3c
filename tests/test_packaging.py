"""The package is what it says: its parts, its imports, its public names, its versions."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import foresight

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12")
SUBPACKAGES = ("commands", "engines", "evaluation", "exporter", "runtime", "serving")

PUBLIC_API = [
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "Estimate",
    "ExportError",
    "FixedSchedule",
    "Forecast",
    "Foresight",
    "ForesightError",
    "Frames",
    "IntegrityError",
    "InvalidRequest",
    "Job",
    "MemoryPlan",
    "NoReuse",
    "OutOfMemory",
    "OutputError",
    "Policy",
    "Progress",
    "PromptEmbeddings",
    "QueueFull",
    "RequestLimits",
    "Runtime",
    "Static",
    "Step",
    "StepTrace",
    "Trace",
    "Video",
    "VideoPipeline",
    "VideoRequest",
    "__version__",
    "load",
]

# What each part of the package may not import from the others.
FORBIDDEN = {
    "commands": {"cli"},
    "engines": {"cli", "commands", "evaluation", "exporter", "runtime", "serving"},
    "evaluation": {"cli", "commands", "exporter", "serving"},
    "exporter": {"cli", "commands", "evaluation", "runtime", "serving"},
    "runtime": {"cli", "commands", "evaluation", "exporter", "serving"},
    "serving": {"cli", "commands", "evaluation", "exporter"},
}
# What only the exporter and the peers of benchmarks may import: the world of torch.
TORCH = {
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "torch",
    "transformers",
}
PEERS = "foresight.evaluation.peers"
# Except for the backend that is onnx's own, and for metrics that are networks.
ALLOWED = {
    ("foresight.engines.reference", "onnx"),
    ("foresight.evaluation.metrics.clip", "torch"),
    ("foresight.evaluation.metrics.clip", "transformers"),
    ("foresight.evaluation.metrics.fvd", "torch"),
    ("foresight.evaluation.metrics.lpips", "torch"),
}
# Of the exporter, what runs without all of that; and of the peers, what does not.
WITHOUT_TORCH = {"foresight.exporter.registry"}
WITH_TORCH = {f"{PEERS}.blocks"}
# What of the server speaks HTTP.
WITH_HTTP = {f"foresight.serving.{name}" for name in ("api", "metrics", "middleware", "schemas")}
# And what runs on Ray.
WITH_RAY = {f"foresight.serving.{name}" for name in ("batch_ray", "ray")}
# Modules of the extras, by the names they are imported by.
EXTRAS = {*TORCH, "PIL", "av", "cupy", "jinja2", "polygraphy", "psutil", "sentencepiece", "skimage", "tensorrt"}
EXTRAS |= {"cache_dit", "cdfvd", "cryptography", "lpips", "openvino", "optuna", "ray", "torchmetrics"}
EXTRAS |= {"fastapi", "multipart", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn"}


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return table


def source_files() -> dict[str, Path]:
    """All files of the package by module name, such as foresight.engines.bundle."""
    files = [*ROOT.glob("*.py"), *(path for name in SUBPACKAGES for path in (ROOT / name).rglob("*.py"))]
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in files}
    return {".".join(("foresight", *(part for part in parts[path] if part != "__init__"))): path for path in files}


def imported_modules(module: str, path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports anywhere; of `from a import b`, a.b, for b may be a module."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8", cwd=ROOT.parent)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_foresight_loads_nothing_heavy() -> None:
    loaded = run_python("import foresight, sys; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert not {*EXTRAS, "click", "msgspec", "numpy", "onnxruntime", "tokenizers"} & set(loaded)


def test_engines_runtime_and_command_line_import_with_the_base_dependencies_alone() -> None:
    exporter = {name for name in source_files() if name.startswith("foresight.exporter.")}
    modules = source_files().keys() - (exporter - WITHOUT_TORCH) - WITH_TORCH - WITH_HTTP - WITH_RAY
    code = """
import sys
extras, modules = (argument.split(",") for argument in sys.argv[1:])

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in extras:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for module in modules:
    __import__(module)
"""
    run_python(code, ",".join(EXTRAS), ",".join(modules))


@pytest.mark.parametrize("part", SUBPACKAGES)
def test_imports_flow_one_way(part: str) -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, path in source_files().items()
        if module.split(".")[1:2] == [part]
        for imported in imported_modules(module, path)
        if imported.startswith("foresight.") and imported.split(".")[1] in FORBIDDEN[part]
    ]
    assert not wrong


def test_only_the_exporter_and_peers_import_torch_and_its_world() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, path in source_files().items()
        if not module.startswith(("foresight.exporter", PEERS))
        for imported in imported_modules(module, path)
        if imported.partition(".")[0] in TORCH and (module, imported.partition(".")[0]) not in ALLOWED
    ]
    assert not wrong


def test_inside_the_package_imports_are_relative() -> None:
    wrong = [
        f"{module}, line {node.lineno}"
        for module, path in source_files().items()
        if module != "foresight.cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "foresight"
    ]
    assert not wrong


def test_the_public_api_is_pinned() -> None:
    assert foresight.__all__ == PUBLIC_API


@pytest.mark.parametrize("name", PUBLIC_API)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(foresight, name) is not None


def test_the_version_is_the_same_everywhere() -> None:
    assert foresight.__version__ == project()["project"]["version"]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_every_constraint_is_an_exact_pin() -> None:
    assert [str(pin) for pin in pins() if not re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(pin.specifier))] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_pin_within_its_bounds(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pinned: dict[str, list[str]] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(environment):
            pinned.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    table = project()["project"]
    for line in [
        *table["dependencies"],
        *(line for lines in table["optional-dependencies"].values() for line in lines),
    ]:
        requirement = Requirement(line)
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert len(versions) == 1, line
        assert requirement.specifier.contains(versions[0]), line


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    everything = (".*", "__pycache__", "build", "bundles", "dist", "evaluations", "latte", "out", "tunings", "work")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*everything, "*.egg-info"))
    build = (
        "import os, sys; from setuptools import build_meta; os.chdir(sys.argv[1]); build_meta.build_wheel(sys.argv[2])"
    )
    run_python(build, str(folder / "source"), str(folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.parametrize("arguments", [["export", "--model", "latte-demo"], ["export", "--model", "x"], ["inspect"]])
def test_an_installed_package_speaks_of_no_clone(wheel: Path, tmp_path: Path, arguments: list[str]) -> None:
    site = wheel.parent / "site"
    if not site.exists():
        zipfile.ZipFile(wheel).extractall(site)
    code = "import sys; sys.argv[0] = '/usr/bin/foresight'; from foresight.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (2, 3) and done.stderr.startswith("error: ")
    assert "cli.py" not in done.stderr and "demo/" not in done.stderr
    if arguments[-1] == "x":
        assert "latte-demo" not in done.stderr
    if arguments == ["inspect"]:
        assert "foresight export --model NAME" in done.stderr


def test_a_clone_is_run_by_what_make_installed_into_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "cli.py", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "the other one: $@"\n')
    python.chmod(0o755)
    bare = [sys.executable, "-S", "-I", str(tmp_path / "cli.py"), "env", "--json"]  # finds no installed package
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert done.stdout == f"the other one: {tmp_path / 'cli.py'} env --json\n"
    python.unlink()
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("click is not installed; run: pip install")


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    others = (path for part in SUBPACKAGES for path in (ROOT / part).rglob("*.*") if "__pycache__" not in path.parts)
    expected = {path.relative_to(ROOT).as_posix() for path in (*source_files().values(), *others)}
    assert {name for name in names if ".dist-info/" not in name} == {
        f"foresight/{name}" for name in (*expected, "py.typed")
    }
    assert {name for name in expected if "/" not in name} == {"__init__.py", "cli.py"}
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def commands_of(target: str, *variables: str) -> list[str]:
    """What make would run for a target in a clone whose dependencies have changed."""
    command = ["make", "--dry-run", "--what-if=pyproject.toml", target, *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("target", ["test", "test-all", "test-rtx", "test-simulated-gpu", "lint", "demo"])
def test_what_needs_no_gpu_installs_nothing_for_one(target: str) -> None:
    (installed,) = (line for line in commands_of(target) if "-m pip " in line)
    assert '".[export,video,report,dev]"' in installed and "nvidia" not in installed


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_what_needs_a_gpu_installs_its_libraries_and_keeps_one_onnx_runtime(target: str) -> None:
    first, second, third, fourth = (line.partition(" -m pip ")[2] for line in commands_of(target) if "-m pip " in line)
    assert '".[export,video,report,dev]"' in first
    assert '".[cuda,tensorrt]" --extra-index-url https://pypi.nvidia.com' in second
    assert third.startswith("uninstall") and third.endswith(" onnxruntime onnxruntime-gpu")
    assert '--no-deps "onnxruntime-gpu>=1.31"' in fourth


def test_tensorrt_can_be_left_out() -> None:
    assert not [line for line in commands_of("test-gpu", "GPU_EXTRAS=cuda") if "tensorrt" in line]


def test_every_way_to_install_the_extra_cuda_keeps_one_onnx_runtime() -> None:
    keep = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-deps "onnxruntime-gpu>=1.31"'
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    installs = [block for block in blocks if re.search(r"pip install .*\bcuda\b", block)]
    assert len(installs) == 2
    assert all(keep in block for block in installs)
    assert keep in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
