"""The templates of the pages, and the libraries that they need."""

from __future__ import annotations

from importlib import resources
from typing import Any

from ...engines.errors import OutputError, one_line


def check_libraries() -> None:
    """Raise OutputError where jinja2 or Pillow is missing; call it before the work that a page shows."""
    try:
        import jinja2  # noqa: F401
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise OutputError(
            f"report: jinja2 or Pillow is not installed ({one_line(error)}); "
            'pip install "foresight-engines[report]", or do without the report'
        ) from error


def render(name: str, content: dict[str, Any]) -> bytes:
    """A page of this folder's template, as UTF-8."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_source),
    )
    # a prompt from a shell may hold lone surrogates, which UTF-8 cannot
    return environment.get_template(name).render(content).encode("utf-8", "replace")


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
