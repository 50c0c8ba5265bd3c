"""The pages hold: commands and Python in them run, links lead somewhere, tables are the recorded results."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from benchmarks.readme import PAGES, render
from foresight.commands.console import cli
from foresight.runtime.caches import CACHE_MODES
from foresight.runtime.policies import POLICIES
from tests.test_packaging import project, source_files

REPOSITORY = Path(__file__).parents[1]
# In the order in which they are followed: they share one folder, and what one exports another may use.
FOLLOWED = (
    "README",
    "docs/export",
    "docs/commands",
    "docs/memory",
    "docs/openvino",
    "docs/tensorrt",
    "docs/embedding",
    "docs/reuse",
    "docs/bench",
    "docs/evaluate",
    "docs/tune",
)
LINKED = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for folder in (".", "docs", "demo", "benchmarks")
    for path in (REPOSITORY / folder).glob("*.md")
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = ("FROM ", "COPY ", "ENTRYPOINT ", 'eval "$(_FORESIGHT_COMPLETE=')  # a Dockerfile's, and a shell's own


class Block(NamedTuple):
    """Text between fences: `bash` and `python` are run, what has no language is only looked at."""

    page: str
    language: str
    text: str


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def lines_of(block: Block) -> list[str]:
    """Its commands, one string each, without what follows a #."""
    joined = block.text.replace("\\\n", " ")
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()) if line]


BLOCKS = [Block(page, *found) for page in LINKED if page != "demo/README.md" for found in FENCE.findall(text_of(page))]
COMMANDS = [
    pytest.param(line, id=f"{page}: {line.removeprefix('python cli.py ')}")
    for page in FOLLOWED
    for block in BLOCKS
    if block.page == f"{page}.md" and block.language == "bash"
    for line in lines_of(block)
]
SCRIPTS = {
    page: "\n".join(block.text for block in BLOCKS if block.page == f"{page}.md" and block.language == "python")
    for page in FOLLOWED
}
SHOWN = [
    pytest.param(line, id=f"{block.page}: {line}")
    for block in BLOCKS
    if not block.language
    for line in lines_of(block)
    if block.page != "CONTRIBUTING.md" or re.match(r"make |python |pip ", line)  # the others draw the folders
]


@pytest.fixture(scope="module")
def folder(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pages are followed from top to bottom; the demo's bundle is there already."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(demo_bundle, folder / "bundles" / "latte-demo")
    return folder


def follow(arguments: list[str], folder: Path) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stderr}"


def test_every_page_with_blocks_that_run_is_followed() -> None:
    assert {block.page for block in BLOCKS if block.language} == {f"{page}.md" for page in FOLLOWED}
    assert {block.language for block in BLOCKS} == {"", "bash", "python"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command: str, folder: Path) -> None:
    assert command.startswith("python cli.py ")
    follow([str(REPOSITORY / "cli.py"), *shlex.split(command)[2:]], folder)


def test_files_named_in_the_commands_were_written(folder: Path) -> None:
    for name in ("blue.mp4", "latents.npy", "frames.npy", "page.html", "trace.json"):
        assert (folder / name).stat().st_size > 0, name


@pytest.mark.parametrize("page", [page for page, script in SCRIPTS.items() if script])
def test_python_of_a_page_runs(page: str, folder: Path) -> None:
    follow(["-c", SCRIPTS[page]], folder)


def test_embedding_example_writes_its_video(folder: Path) -> None:
    assert (folder / "circle.mp4").is_file()


def test_web_application_of_the_embedding_page_answers_with_a_video(folder: Path) -> None:
    (application,) = (block.text for block in BLOCKS if block.page == "docs/embedding.md" and "FastAPI" in block.text)
    asked = """
from fastapi.testclient import TestClient
with TestClient(app) as client:
    answer = client.post("/videos", params={"prompt": "a red circle moving right", "steps": 2})
assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4"), answer.text
assert answer.content[4:8] == b"ftyp"
"""
    follow(["-c", f"import foresight\n{application}\n{asked}"], folder)


@pytest.mark.parametrize("line", SHOWN)
def test_what_is_only_shown_exists(line: str) -> None:
    """Where there is no GPU or network to run it: targets of make, extras, modules, commands and their options."""
    understood = line.startswith(NOT_RUN)
    for extras in re.findall(r'"[\w./-]*\[([\w,-]+)\]"', line):
        assert set(extras.split(",")) <= set(project()["project"]["optional-dependencies"])
    words = shlex.split(line.removeprefix("RUN "))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", text_of("Makefile"), re.MULTILINE)
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "foresight" or words[:2] == ["docker", "run"]:
        last = len(words) - 1 - words[::-1].index("foresight")
        parse(words[last + 1 :])
    else:
        understood |= words[0] in ("pip", "docker", "kubectl", "tritonserver")
        assert understood, "nothing here knows how to check this"


def parse(arguments: list[str]) -> None:
    """Raises click.UsageError for a command or an option that there is not."""
    command = cli.get_command(click.Context(cli), arguments[0])
    assert command is not None, arguments[0]
    command.make_context(arguments[0], arguments[1:], parent=click.Context(cli, **cli.context_settings))


def test_the_readme_lists_every_command() -> None:
    listed = re.findall(r"^\| `([a-z]+)[^|]*` \|", text_of("README.md").partition("## Commands")[2], re.MULTILINE)
    assert sorted(listed) == cli.list_commands(click.Context(cli))


def test_the_readme_leads_to_every_page() -> None:
    leads = {path for path, _ in LINK.findall(text_of("README.md"))}
    assert {page for page in LINKED if page not in ("README.md", "CHANGELOG.md")} - {"demo/README.md"} <= leads


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_to_what_is_there(page: str) -> None:
    for path, anchor in LINK.findall(text_of(page)):
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors_of(target), f"{path}#{anchor}"


def anchors_of(page: Path) -> set[str]:
    """What headings can be linked by, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_the_recorded_results(page: str) -> None:
    assert render(page) == text_of(page), "run: python -m benchmarks.readme"


def test_every_result_is_shown_on_a_page() -> None:
    drawn = {file for sections in PAGES.values() for _, files in sections.values() for file in files}
    recorded = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("benchmarks/results/*.json")}
    assert recorded <= drawn


def test_messages_that_a_page_explains_are_told_by_the_code() -> None:
    table = text_of("docs/troubleshooting.md").partition("## What to do")[2]
    quoted = [
        piece for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for piece in re.findall(r"`(.*?)`", row)
    ]
    code = "".join(path.read_text(encoding="utf-8") for path in source_files().values())
    pieces = [part.strip() for piece in quoted for part in piece.split("…") if part.strip()]
    assert len(pieces) > 10
    assert [part for part in pieces if part not in code] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/gpu.md"])
def test_files_that_a_page_names_are_there(page: str) -> None:
    named = re.findall(r"`([a-z_]+/[\w./]*)`", text_of(page))
    assert named
    assert [name for name in named if not re.search("[A-Z]{3}", name) and not (REPOSITORY / name).exists()] == []


def test_every_policy_and_cache_mode_has_a_row() -> None:
    rows = set(re.findall(r"^\| `([a-z]+)`", text_of("docs/reuse.md"), re.MULTILINE))
    assert rows == {*POLICIES, *CACHE_MODES}
