"""Of a model on the hub, configurations and headers come first; each way in which it is not to be had has a remedy."""

from __future__ import annotations

import errno
import json
import os
import re
import ssl
import subprocess
import sys
from typing import Any

import httpx
import pytest

from foresight.engines.errors import CheckpointError, InvalidRequest
from foresight.exporter.checkpoint import find_checkpoint
from foresight.exporter.hub import Place, explained, place_from_url
from tests.hub import Hub, serve
from tests.support import tiny_latte

MAIN, OTHER = "a" * 40, "b" * 40
# Runs in a process of its own, which may use the hub; what each of the trials came to is printed as JSON.
PROGRAM = """
import json, os, sys
from pathlib import Path
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from foresight import ForesightError
from foresight.exporter.checkpoint import find_checkpoint
from foresight.exporter.export import Export, ExportRequest

out, results, own = Path(sys.argv[1]), {}, constants.ENDPOINT

def attempt(name, model, **settings):
    try:
        plan = Export("latte", ExportRequest(), model, out / "bundle", **settings).plan()
        results[name] = {"download": plan.download_bytes, "revision": plan.revision, "cautions": plan.cautions}
    except ForesightError as error:
        results[name] = f"{type(error).__name__}: {error}"

attempt("plain", "some/latte")
attempt("revision", "some/latte", revision="v1")
attempt("address", "https://huggingface.co/some/latte/tree/v1")
attempt("no revision", "some/latte", revision="v9")
for name in ("gated", "private", "absent", "limited", "broken", "cut", "short", "sharded", "foreign"):
    attempt(name, f"some/{name}")
os.environ["HF_TOKEN"] = "hf_mine"
for name in ("gated", "private", "refused", "forbidden"):
    attempt(f"{name} with token", f"some/{name}")
del os.environ["HF_TOKEN"]
constants.HF_HUB_OFFLINE = True
attempt("offline", "some/new")
attempt("offline with configurations", "some/latte")
constants.HF_HUB_OFFLINE = False
for name, endpoint in {
    "mirror": "http://127.0.0.1:9", "no address": "mirror", "no hub": own + "/html"
}.items():
    constants.ENDPOINT = endpoint
    attempt(name, "some/new")
constants.ENDPOINT = own
os.environ["HTTP_PROXY"] = "http://me:secret@127.0.0.1:9"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = ""
close_session()
attempt("proxy", "some/new")
del os.environ["HTTP_PROXY"]
close_session()
constants.HF_HUB_CACHE = str(out / "file" / "cache")
(out / "file").write_text("")
attempt("no cache", "some/latte")
constants.HF_HUB_CACHE = str(out / "cache")
places = {"transformer": "some/latte/transformer", "vae": "some/latte/vae"}
results["apart"] = find_checkpoint(places, revision="transformer=v1").revision
job = Export("latte", ExportRequest(), "some/latte", out / "bundle")
job.fetch()
results["fetched"] = [job.plan().download_bytes, job.source.checkpoint, job.source.revision]
constants.HF_HUB_OFFLINE = True
attempt("offline with all", "some/latte")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """Models that are well, and some that are not."""
    folder = tmp_path_factory.mktemp("hub")
    sizes: dict[str, Any] = {"pairs": 1, "frames": 1, "text": {"num_layers": 1}, "vae": {"block_out_channels": (8,)}}
    published = Hub()
    published.add("some/latte", tiny_latte(folder / "latte", heads=8, head_dim=32, **sizes), MAIN)
    published.add("some/latte", folder / "latte", OTHER, "v1")
    published.add("some/gated", folder / "latte", MAIN)
    cut = tiny_latte(folder / "cut", **sizes)
    (cut / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"<html>sorry</html>")
    published.add("some/cut", cut, MAIN)
    short = tiny_latte(folder / "short", **sizes)
    os.truncate(short / "vae/diffusion_pytorch_model.safetensors", 30_000)
    published.add("some/short", short, MAIN)
    foreign = tiny_latte(folder / "foreign", **sizes)
    config = foreign / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 2}))
    published.add("some/foreign", foreign, MAIN)
    sharded = tiny_latte(folder / "sharded", **sizes)
    table = {"weight_map": {"proj_out.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    index = sharded / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(table))
    published.add("some/sharded", sharded, MAIN)
    published.errors = {
        "some/gated": (403, "GatedRepo"),
        "some/private": (401, "RepoNotFound"),
        "some/refused": (401, "Invalid credentials in Authorization header"),
        "some/forbidden": (403, "Forbidden"),
        "some/limited": (429, "TooMany"),
        "some/broken": (503, "Down"),
        "html/api": (200, ""),
    }
    return published


@pytest.fixture(scope="module")
def results(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every trial, by its name."""
    folder = tmp_path_factory.mktemp("work")
    unwanted = ("HF_", "HTTP", "http", "ALL_PROXY", "NO_PROXY", "no_proxy", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    with serve(hub):
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", PROGRAM, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "secret" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_plan_says_what_a_download_takes(results: dict[str, Any], hub: Hub) -> None:
    folder = hub.folders["some/latte", MAIN]
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    tokenizer = sum(file.stat().st_size for file in folder.glob("tokenizer/*.json"))
    plan = results["plain"]
    assert weights < plan["download"] <= weights + tokenizer
    assert plan["revision"] == MAIN and not plan["cautions"]


def test_a_plan_reads_headers_alone(results: dict[str, Any], hub: Hub) -> None:
    big = hub.folders["some/latte", MAIN] / "transformer/diffusion_pytorch_model.safetensors"
    sent = [size for _, path, size in hub.log if path.endswith(f"latte/resolve/{OTHER}/transformer/{big.name}")]
    assert sent and max(sent) <= 100_001 < big.stat().st_size


def test_a_revision_is_named_with_its_commit(results: dict[str, Any]) -> None:
    assert results["revision"]["revision"] == results["address"]["revision"] == f"v1 ({OTHER})"
    assert results["apart"] == f"transformer v1 ({OTHER}), vae {MAIN}"


def test_what_was_fetched_needs_no_hub_any_more(results: dict[str, Any]) -> None:
    assert results["fetched"] == [0, "some/latte", MAIN]
    assert results["offline with all"]["download"] == 0


@pytest.mark.parametrize(
    ("trial", "told"),
    [
        ("no revision", "no revision v9); choose a branch, tag or commit"),
        ("gated", "it is gated, and an account has to be granted access); accept its conditions at"),
        ("gated", "then run `hf auth login` or set HF_TOKEN"),
        ("gated with token", "it is gated, and the account of your token has to be granted access); accept"),
        ("private", "no such model, or it is private); check the name; if it is private, run `hf auth login`"),
        ("private with token", "see that your token may read it"),
        ("absent", "no such model, or it is private); check the name"),
        ("refused with token", "the token you gave is not accepted); run `hf auth login`"),
        ("forbidden with token", "the token you gave may not read it); run `hf auth login`"),
        ("limited", "the hub was asked too often); wait"),
        ("broken", "the hub answers 503); it does not work at the moment: try again later"),
        ("offline", "HF_HUB_OFFLINE is set and nothing of it is in the cache); unset HF_HUB_OFFLINE"),
        (
            "offline with configurations",
            "has no weights, expected model.safetensors; it is not all in the cache: unset HF_HUB_OFFLINE",
        ),
        ("mirror", "http://127.0.0.1:9, which HF_ENDPOINT names, cannot be reached); correct or unset HF_ENDPOINT"),
        ("no address", "mirror is no address); correct or unset HF_ENDPOINT, expected https://host"),
        ("no hub", "answers something else than the hub's API); check HF_ENDPOINT"),
        ("proxy", "the proxy 127.0.0.1:9 does not lead to http://127.0.0.1"),
        ("proxy", "correct or unset HTTP_PROXY"),
        ("no cache", "cannot be written); check its permissions, or set HF_HOME"),
        ("cut", "vae/diffusion_pytorch_model.safetensors is no safetensors file on the hub"),
        ("short", "vae/diffusion_pytorch_model.safetensors is cut off on the hub, it has 30000 bytes, expected"),
        ("sharded", "transformer has 0 of the 1 shards that diffusion_pytorch_model.safetensors.index.json names"),
        ("foreign", "transformer: weights 34 missing ("),
    ],
)
def test_what_is_not_to_be_had_is_told_with_its_own_remedy(results: dict[str, Any], trial: str, told: str) -> None:
    message = results[trial]
    assert isinstance(message, str) and message.startswith("CheckpointError: checkpoint some/"), message
    assert told in message and "\n" not in message


def tls(reason: str) -> ssl.SSLError:
    """As the library has them: their number is that of a missing permission."""
    return ssl.SSLError(1, f"[SSL: {reason}] of a test (_ssl.c:1006)")


@pytest.mark.parametrize(
    ("cause", "outer", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), None, "is full); free some space, or set HF_HOME"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("x"), "is full); free some space"),
        (tls("CERTIFICATE_VERIFY_FAILED"), httpx.ConnectError("x"), "is not trusted); set SSL_CERT_FILE"),
        (tls("NO_CERTIFICATE_OR_CRL_FOUND"), None, "holds no certificates); correct or unset SSL_CERT_FILE"),
        (tls("WRONG_VERSION_NUMBER"), httpx.ConnectError("x"), "as https:// wants it); check HF_ENDPOINT"),
        (FileNotFoundError(2, "No such file"), None, "names /none.pem, which is not there); correct or unset SSL_"),
        (httpx.ProxyError("407 Proxy Authentication Required"), None, "wants another name and password, or some"),
        (httpx.ProxyError("403 Forbidden"), None, "cannot be reached"),
    ],
    ids=str,
)
def test_disks_certificates_and_proxies_are_not_taken_for_each_other(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, outer: Exception | None, told: str
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "/none.pem")
    error = cause if outer is None else outer
    error.__cause__ = None if outer is None else cause
    with pytest.raises(CheckpointError, match=re.escape(told)), explained("some/latte", None):
        raise error


# Names and addresses


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("https://huggingface.co/owner/name", Place("owner/name")),
        ("https://huggingface.co/owner/name/", Place("owner/name")),
        ("http://hf.co/owner/name?library=diffusers#top", Place("owner/name")),
        ("huggingface.co/owner/name/tree/main", Place("owner/name")),
        ("https://huggingface.co/owner/name/tree/v1", Place("owner/name", "", "v1")),
        ("https://huggingface.co/owner/name/tree/v1/inner/folder", Place("owner/name", "inner/folder", "v1")),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F1", Place("owner/name", "", "refs/pr/1")),
        ("https://huggingface.co/owner/name/blob/v1/model_index.json", Place("owner/name", "", "v1")),
        ("owner/name", None),
        ("./folder", None),
    ],
)
def test_an_address_of_the_hub_is_understood(text: str, place: Place | None) -> None:
    assert place_from_url(text) == place


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://example.org/owner/name", "is an address, but not of the hub"),
        ("https://huggingface.co/datasets/owner/name", "is no address of a model"),
        ("https://huggingface.co/spaces/owner/name", "is no address of a model"),
        ("https://huggingface.co/owner", "is no address of a model"),
    ],
)
def test_other_addresses_are_refused(text: str, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        find_checkpoint(text)


def test_two_revisions_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="got 'v2' and an address of 'v1', expected one"):
        find_checkpoint("https://hf.co/owner/name/tree/v1", revision="v2")


def test_a_revision_of_an_unknown_component_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected COMPONENT=REVISION for some of transformer"):
        find_checkpoint({"transformer": "owner/name"}, revision="encoder=v1")
