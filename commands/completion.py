"""What a shell completes: names out of the library's registries, read without the libraries that they stand for.

`eval "$(_FORESIGHT_COMPLETE=bash_source foresight)"` switches it on, in bash; other shells have theirs, see click.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import click
from click.shell_completion import CompletionItem

BUNDLES = Path("bundles")

Complete: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names(of: Iterable[str]) -> Complete:
    """Completes one of them."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in of if name.startswith(incomplete)]

    return complete


def bundle_folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes the bundles under bundles/; what is none of them, as folders elsewhere."""
    found = sorted(str(manifest.parent) for manifest in BUNDLES.glob("*/manifest.json"))
    found = [folder for folder in found if not folder.endswith(".partial")]
    here = [CompletionItem(folder) for folder in found if folder.startswith(incomplete)]
    return here or [CompletionItem(incomplete, type="dir")]
