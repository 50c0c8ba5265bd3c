"""`foresight sign`: say with a key that a bundle is one's own."""

from __future__ import annotations

from pathlib import Path

import click

from ..engines.errors import InvalidRequest
from .console import print_result, progress
from .options import PATH, bundle_argument, common


@click.command()
@bundle_argument
@click.option("--key", type=PATH, help="The private key, Ed25519 in PEM.")
@click.option("--generate", type=PATH, help="Make a key pair instead: this file, and beside it NAME.pub.pem.")
@common
def sign(bundle: Path | None, key: Path | None, generate: Path | None, as_json: bool) -> None:
    """Verify a bundle, then sign its manifest and the index of its engines; or make the keys for it."""
    if generate is not None:
        if bundle is not None or key is not None:
            raise InvalidRequest(
                "generate: got a bundle or --key too, expected --generate alone; sign in a second step"
            )
        _generate(generate, as_json)
        return
    if bundle is None or key is None:
        raise InvalidRequest("key: expected BUNDLE and --key PRIVATE.pem; make keys with --generate PRIVATE.pem")
    from ..engines.bundle import open_bundle, verify_files
    from ..engines.signatures import read_private_key
    from ..engines.signing import sign_bundle
    from ..runtime.profiles import check_profiles

    secret = read_private_key(key)
    opened = open_bundle(bundle)
    check_profiles(opened)
    with progress() as show:
        verify_files(opened, show)
    written = sign_bundle(opened, secret)
    row = {"bundle": str(opened.path), "id": opened.id, "signatures": [str(file) for file in written]}
    print_result(row, as_json, [f"{file}: signed, after all files were verified" for file in written])


def _generate(private: Path, as_json: bool) -> None:
    from ..engines.signatures import generate_key

    public = generate_key(private)
    lines = [
        f"{private}: the private key; keep it secret",
        f"{public}: the public key, for those who load what it signed",
    ]
    print_result({"private": str(private), "public": str(public)}, as_json, lines)
