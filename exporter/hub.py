"""Checkpoints on the Hugging Face hub, or a mirror of it: what is there, what of it to download, and why that fails.

Configurations come first and are small; of weights only the headers are read, by ranged requests, until `fetch` is
called. All is kept in the hub library's own cache, which is where offline exports find it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import ssl
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import huggingface_hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from ..engines.errors import CheckpointError, one_line
from .weights import Header, LocalFiles, Stored

log = logging.getLogger("foresight")

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")
OFFLINE_REMEDY = "it is not all in the cache: unset HF_HUB_OFFLINE and export again, which downloads what is missing"
NO_CONNECTION = (
    "ProxyError ConnectError ConnectTimeout ReadTimeout WriteTimeout PoolTimeout ReadError WriteError CloseError "
    "RemoteProtocolError ConnectionError ConnectionRefusedError TimeoutError"
)


@dataclass(frozen=True)
class Place:
    """A folder of a repository on the hub ("" is its root), at a revision or at the main branch."""

    repository: str
    folder: str = ""
    revision: str | None = None

    def path(self, *names: str) -> str:
        """A file's path inside the repository."""
        return "/".join(part for part in (self.folder, *names) if part)


def place_from_url(text: str) -> Place | None:
    """The place that an address of the hub's pages names, with or without https://; None for what is no address.

    Raises CheckpointError for addresses of something else.
    """
    bare = text.split("://", 1)[-1]
    if "://" not in text and bare.partition("/")[0] not in HOSTS:
        return None
    url = urlsplit(f"https://{bare}")
    if url.netloc not in (*HOSTS, urlsplit(huggingface_hub.constants.ENDPOINT).netloc):
        raise CheckpointError(
            f"checkpoint {text}: is an address, but not of the hub; expected https://huggingface.co/owner/name, a hub "
            "id or a folder"
        )
    parts = [unquote(part) for part in url.path.split("/") if part]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    if len(parts) < 2 or parts[0] in ("datasets", "spaces", "collections", "papers", "docs", "blog", "api"):
        raise CheckpointError(
            f"checkpoint {text}: is no address of a model; expected https://huggingface.co/owner/name, with "
            "/tree/REVISION for another revision than main"
        )
    revision = parts[3] if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "commit") else None
    folder = "/".join(parts[4:]) if parts[2:3] == ["tree"] else ""
    return Place("/".join(parts[:2]).removesuffix(".git"), folder, None if revision == "main" else revision)


class Repository:
    """A repository at one commit, of which the files that match `first` are downloaded and no others yet.

    Raises CheckpointError. Where the hub cannot be asked, what is in the cache stands for it.
    """

    def __init__(self, repository: str, revision: str | None, first: Collection[str]) -> None:
        self.name = repository
        self.asked = revision
        with explained(repository, revision):
            self.folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(first)))
        self.commit = self.folder.name
        self.sizes = self._list()

    @property
    def revision(self) -> str:
        """The commit, after the name that was asked for it by."""
        return self.commit if self.asked in (None, self.commit) else f"{self.asked} ({self.commit})"

    def _list(self) -> Mapping[str, int] | None:
        """The size of every file, or None where the hub cannot be asked."""
        try:
            HfApi().repo_info(self.name, revision=self.commit)  # fails at once, where a list is tried again and again
            tree = HfApi().list_repo_tree(self.name, revision=self.commit, recursive=True)
            return {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
        except Exception as error:  # noqa: BLE001 - whatever it is: the cache was enough so far
            log.info("%s: the hub cannot be asked (%s), its cache is read", self.name, type(error).__name__)
            return None

    @property
    def names(self) -> Collection[str]:
        """The paths of all files, downloaded or not."""
        if self.sizes is not None:
            return self.sizes.keys()
        inside = (path for path in self.folder.rglob("*") if not path.is_dir())
        return [path.relative_to(self.folder).as_posix() for path in inside]

    def bytes_missing(self, names: Iterable[str]) -> int:
        """How much of these files is still to be downloaded."""
        return sum((self.sizes or {}).get(name, 0) for name in names if not (self.folder / name).exists())

    def fetch(self, names: Collection[str]) -> None:
        """Download these files, but for those that are there. Raises CheckpointError."""
        if self.sizes is None or all((self.folder / name).exists() for name in names):
            return
        with explained(self.name, self.asked):
            snapshot_download(self.name, revision=self.commit, allow_patterns=[_literal(name) for name in names])

    def header(self, path: str) -> Header:
        """What a safetensors file that was not downloaded says of itself. Raises CheckpointError."""
        with explained(self.name, self.asked):
            try:
                found = HfApi().parse_safetensors_file_metadata(self.name, path, revision=self.commit)
            except SafetensorsParsingError as error:
                raise CheckpointError(
                    f"checkpoint {self.name}: {path} is no safetensors file on the hub ({one_line(error)[:200]}); "
                    "choose another revision, or tell its authors"
                ) from error
        end = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
        size = (self.sizes or {}).get(path, end)
        if size < end:
            raise CheckpointError(
                f"checkpoint {self.name}: {path} is cut off on the hub, it has {size} bytes, expected more than {end}; "
                "choose another revision, or tell its authors"
            )
        file = PurePosixPath(path).name
        weights = {name: Stored(file, str(info.dtype), tuple(info.shape)) for name, info in found.tensors.items()}
        return Header(weights, dict(found.metadata or {}))


def _literal(name: str) -> str:
    """A pattern that matches one name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@dataclass(frozen=True)
class HubFiles:
    """The files of one component in a repository's folder; of weights, headers are read before they are downloaded."""

    label: str
    repository: Repository
    folder: str

    def path(self, name: str) -> str:
        """The path of a file inside the repository."""
        return f"{self.folder}/{name}".lstrip("/")

    @property
    def remedy(self) -> str:
        """What to do where a file is missing."""
        if self.repository.sizes is None:
            return OFFLINE_REMEDY if huggingface_hub.constants.HF_HUB_OFFLINE else "export again with the hub in reach"
        return f"choose another revision, or delete {self.repository.folder} and export again"

    @property
    def names(self) -> Collection[str]:
        """Names of all files in the folder."""
        paths = map(PurePosixPath, self.repository.names)
        return [path.name for path in paths if path.parent == PurePosixPath(self.folder)]

    @property
    def local(self) -> LocalFiles:
        """The ones that are downloaded."""
        return LocalFiles(self.label, self.repository.folder / self.folder, self.remedy)

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file. Raises CheckpointError."""
        self.repository.fetch([self.path(name)])
        return self.local.read_json(name)

    def header(self, name: str) -> Header:
        """The header of a safetensors file. Raises CheckpointError."""
        path = self.path(name)
        if self.repository.sizes is None or (self.repository.folder / path).exists():
            return self.local.header(name)
        return self.repository.header(path)


def cache_free_bytes() -> tuple[Path, int]:
    """Where the hub's library keeps what it downloads, and how much room is there."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE).expanduser().absolute()
    return cache, free_bytes(cache)


def on_one_disk(first: Path, second: Path) -> bool:
    """Whether two folders, or what there is of them yet, lie on the same file system."""
    return _present(first).stat().st_dev == _present(second).stat().st_dev


def free_bytes(folder: Path) -> int:
    """The room on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(_present(folder)).free


def _present(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextmanager
def explained(repository: str, revision: str | None) -> Iterator[None]:
    """What the hub's library raises meanwhile becomes a CheckpointError with a remedy of its own."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of three libraries, some bare
        reason, remedy = _explain(error, repository, revision)
        raise CheckpointError(
            f"checkpoint {repository}: neither a folder nor to be had from the hub ({reason}); {remedy}, or give a "
            "folder as checkpoint"
        ) from error


def _explain(error: Exception, repository: str, revision: str | None) -> tuple[str, str]:
    """What was wrong, and what to do."""
    causes = list(_causes(error))
    for find in (_of_access, _of_status, _of_certificates, _of_disk, _of_network):
        for cause in causes:
            found = find(cause, repository, revision)
            if found is not None:
                return found
    return one_line(error)[:200] or type(error).__name__, "check the name and the network"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_access(error: BaseException, repository: str, revision: str | None) -> tuple[str, str] | None:
    page = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
    token = huggingface_hub.get_token()
    if isinstance(error, HFValidationError):
        return "that is no name that a model can have", "check the name, expected owner/name"
    if isinstance(error, IncompleteSnapshotError):
        return "the cache has a part of it only", OFFLINE_REMEDY
    if isinstance(error, OfflineModeIsEnabled):
        it = "it" if revision is None else f"its revision {revision}"
        return f"HF_HUB_OFFLINE is set and nothing of {it} is in the cache", "unset HF_HUB_OFFLINE to download it"
    if isinstance(error, GatedRepoError):
        who = "the account of your token" if token else "an account"
        login = "" if token else ", then run `hf auth login` or set HF_TOKEN"
        return f"it is gated, and {who} has to be granted access", f"accept its conditions at {page}{login}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision}", f"choose a branch, tag or commit that {page}/tree/main shows"
    if isinstance(error, RepositoryNotFoundError):
        login = "see that your token may read it" if token else "run `hf auth login` or set HF_TOKEN"
        return "there is no such model, or it is private", f"check the name; if it is private, {login}"
    return None


def _of_status(error: BaseException, repository: str, revision: str | None) -> tuple[str, str] | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if not isinstance(status, int):
        return None
    if status in (401, 403):
        wrong = "the token you gave is not accepted" if status == 401 else "the token you gave may not read it"
        if huggingface_hub.get_token():
            return wrong, "run `hf auth login` with a token that may, or correct or unset HF_TOKEN"
        return "it is not for everyone", "run `hf auth login` or set HF_TOKEN"
    if status == 407:
        return _of_password()
    if status == 429:
        return "the hub was asked too often", "wait some minutes; with a token (`hf auth login`) more is allowed"
    if status >= 500:
        return f"the hub answers {status}", "it does not work at the moment: try again later"
    return f"{_endpoint()} answers {status}", "check the name, and HF_ENDPOINT if it is a mirror"


def _of_password() -> tuple[str, str]:
    variable = (_proxy() or ("HTTPS_PROXY",))[0]
    return "the proxy wants another name and password, or some", f"correct {variable} (http://name:password@host:port)"


def _of_certificates(error: BaseException, repository: str, revision: str | None) -> tuple[str, str] | None:
    """Before disks: the errors of TLS are OSErrors whose numbers mean something else."""
    given, told = os.environ.get("SSL_CERT_FILE"), str(error)
    if given and isinstance(error, FileNotFoundError) and not Path(given).exists():
        return f"SSL_CERT_FILE names {given}, which is not there", "correct or unset SSL_CERT_FILE"
    if "NO_CERTIFICATE" in told:
        return f"SSL_CERT_FILE names {given}, which holds no certificates", "correct or unset SSL_CERT_FILE"
    if "CERTIFICATE" in told.upper():
        return "the certificate of the server is not trusted", "set SSL_CERT_FILE to your proxy's certificates"
    if isinstance(error, ssl.SSLError):
        return f"{_endpoint()} does not answer as https:// wants it", "check HF_ENDPOINT and the proxy"
    return None


def _of_network(error: BaseException, repository: str, revision: str | None) -> tuple[str, str] | None:
    kind = type(error).__name__
    if kind == "ProxyError" and str(error).startswith("407"):  # to https://, where there is no response
        return _of_password()
    if kind in ("UnsupportedProtocol", "InvalidURL", "LocalProtocolError"):
        return f"{_endpoint()} is no address", "correct or unset HF_ENDPOINT, expected https://host"
    if kind in NO_CONNECTION.split():
        proxy = _proxy()
        if proxy is not None:
            return f"the proxy {proxy[1]} does not lead to {_endpoint()}", f"correct or unset {proxy[0]}"
        if _is_mirror():
            return f"{_endpoint()}, which HF_ENDPOINT names, cannot be reached", "correct or unset HF_ENDPOINT"
        return (
            f"{_endpoint()} cannot be reached",
            "check the network; behind a proxy set HTTPS_PROXY, with a mirror HF_ENDPOINT",
        )
    if isinstance(error, (ValueError, KeyError, TypeError, AssertionError)):
        return f"{_endpoint()} answers something else than the hub's API", "check HF_ENDPOINT and the proxy"
    return None


def _of_disk(error: BaseException, repository: str, revision: str | None) -> tuple[str, str] | None:
    if not isinstance(error, OSError):
        return None
    cache = huggingface_hub.constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the cache, {cache}, is full", "free some space, or set HF_HOME to another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return f"the cache, {cache}, cannot be written", "check its permissions, or set HF_HOME to another folder"
    return None


def _endpoint() -> str:
    return str(huggingface_hub.constants.ENDPOINT)


def _is_mirror() -> bool:
    return urlsplit(_endpoint()).hostname not in HOSTS


def _proxy() -> tuple[str, str] | None:
    """The variable that names the proxy to the hub, and the proxy without its password; None where there is none."""
    url = urlsplit(_endpoint())
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.hostname or ""):
        return None
    variable = next((name for name, value in os.environ.items() if value == proxy), f"{url.scheme.upper()}_PROXY")
    return variable, proxy.rpartition("@")[2]
