"""`foresight verify`: whether a bundle's files are those that were written."""

from __future__ import annotations

from pathlib import Path

import click

from .console import print_result, progress
from .options import PATH, bundle_argument, common


@click.command()
@bundle_argument
@click.option("--key", "keys", type=PATH, multiple=True, help="Public key, PEM; one of these must have signed it.")
@common
def verify(bundle: Path | None, keys: tuple[Path, ...], as_json: bool) -> None:
    """Compare every file of a bundle with its manifest, and every compiled engine with its index."""
    from ..engines.bundle import newest_bundle, open_bundle, verify_files
    from ..engines.compiled import list_compiled, verify_compiled
    from ..engines.signatures import read_public_keys
    from ..runtime.profiles import check_profiles

    opened = open_bundle(bundle or newest_bundle(), read_public_keys(keys or None))
    check_profiles(opened)
    with progress() as show:
        verify_files(opened, show)
    engines = list_compiled(opened)
    for compiled in engines:
        verify_compiled(compiled)
    count = len(opened.manifest.files)
    row = {
        "bundle": str(opened.path),
        "id": opened.id,
        "files": count,
        "engines": [str(compiled.folder) for compiled in engines],
        "intact": True,
        "signed": bool(keys),
    }
    lines = [f"{opened.path}: {count} files, all as the manifest says"]
    lines += [f"{compiled.folder}: {len(compiled.index.parts)} engines, all as built" for compiled in engines]
    lines += ["signed by one of the keys given"] if keys else []
    print_result(row, as_json, lines)
