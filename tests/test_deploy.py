"""The recipe of the container and the manifest agree with the command line, with the server, and with each other."""

from __future__ import annotations

import json
import re
from typing import Any

import click
import pytest
import yaml

from foresight.commands.console import cli
from foresight.serving import pool, service
from foresight.serving.api import around
from foresight.serving.middleware import OPEN
from tests.test_packaging import ROOT, SUBPACKAGES, project

FOLDER = ROOT / "deploy"
RECIPE = (FOLDER / "Containerfile").read_text(encoding="utf-8")
MANIFEST = list(yaml.safe_load_all((FOLDER / "cpu" / "foresight.yaml").read_text(encoding="utf-8")))
DEPLOYMENT, SERVICE = (next(one for one in MANIFEST if one["kind"] == kind) for kind in ("Deployment", "Service"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
MOUNTS = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
VOLUMES = {volume["name"]: volume for volume in POD["volumes"]}


def instruction(name: str) -> str:
    """What follows the last one of that name in the recipe."""
    *_, last = re.findall(rf"^{name} (.*)$", RECIPE, re.MULTILINE)
    return str(last)


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options of a command line. Raises click.UsageError for one that there is not."""
    command = cli.get_command(click.Context(cli), arguments[0])
    assert command is not None
    parent = click.Context(cli, **cli.context_settings)
    return command.make_context(arguments[0], arguments[1:], parent=parent).params


SERVED = parsed(CONTAINER["args"])


def test_the_image_starts_the_server_itself_where_others_can_reach_it() -> None:
    assert json.loads(instruction("ENTRYPOINT")) == ["foresight"]
    assert "foresight" in project()["project"]["scripts"]
    options = parsed(json.loads(instruction("CMD")))
    assert (options["host"], str(options["port"])) == ("0.0.0.0", instruction("EXPOSE"))
    assert str(options["data"]) in json.loads(instruction("VOLUME"))


def test_the_image_has_the_package_and_no_model() -> None:
    lines = (FOLDER / "Containerfile.dockerignore").read_text(encoding="utf-8").split()
    assert lines[0] == "*"
    files = {"!constraints.txt", "!LICENSE", "!README.md", "!pyproject.toml", "!py.typed", "!*.py"}
    assert {line for line in lines if line.startswith("!")} == files | {f"!{name}" for name in SUBPACKAGES}
    extras = {name for listed in re.findall(r'"/src\[([\w,-]+)\]"', RECIPE) for name in listed.split(",")}
    assert extras == {"serve", "sign", "cuda", "tensorrt"}
    assert extras <= set(project()["project"]["optional-dependencies"])
    assert 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-deps "onnxruntime-gpu>=1.31"' in RECIPE


def test_nobody_is_root_and_nothing_is_written_but_where_it_is_meant() -> None:
    user, group = instruction("USER").split(":")
    security = POD["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (int(user), int(group), int(group))
    assert int(user) > 0 and security["runAsNonRoot"]
    own = CONTAINER["securityContext"]
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert {name for name, mount in MOUNTS.items() if not mount.get("readOnly")} == {"data", "temporary"}
    assert MOUNTS["temporary"]["mountPath"] == "/tmp"


def test_what_the_server_is_told_is_where_the_manifest_puts_it() -> None:
    (port,) = CONTAINER["ports"]
    assert (SERVED["host"], SERVED["port"]) == ("0.0.0.0", port["containerPort"])
    assert str(SERVED["data"]) == MOUNTS["data"]["mountPath"]
    assert str(SERVED["api_keys"].parent) == MOUNTS["keys"]["mountPath"]
    assert "secret" in VOLUMES["keys"]
    assert all(text.partition("=")[2].startswith(MOUNTS["models"]["mountPath"]) for text in SERVED["bundles"])
    limits = CONTAINER["resources"]["limits"]
    assert SERVED["threads"] == int(limits["cpu"])
    assert CONTAINER["resources"]["requests"]["memory"] == limits["memory"]


def test_volumes_are_claimed_and_clients_are_led_to_the_pod() -> None:
    assert MOUNTS.keys() == VOLUMES.keys()
    claims = (volume["persistentVolumeClaim"] for volume in VOLUMES.values() if "persistentVolumeClaim" in volume)
    claimed = {claim["claimName"] for claim in claims}
    assert claimed == {one["metadata"]["name"] for one in MANIFEST if one["kind"] == "PersistentVolumeClaim"}
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert [port["targetPort"] for port in SERVICE["spec"]["ports"]] == [port["name"] for port in CONTAINER["ports"]]
    assert (DEPLOYMENT["spec"]["replicas"], DEPLOYMENT["spec"]["strategy"]) == (1, {"type": "Recreate"})


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/health/ready"), ("readinessProbe", "/health/ready"), ("livenessProbe", "/health/live")],
)
def test_probes_ask_what_the_server_answers_without_a_key(probe: str, path: str) -> None:
    asked = CONTAINER[probe]["httpGet"]
    assert asked == {"path": path, "port": CONTAINER["ports"][0]["name"]}
    assert path in {route.path for route in around.routes if hasattr(route, "path")}
    assert path.startswith(OPEN)


def test_there_is_time_to_finish() -> None:
    """Open connections have the drain, then running jobs have it, then what still runs is stopped."""
    _, before = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    stopped = service.STOP_SECONDS + 2 * pool.STOP_SECONDS
    assert POD["terminationGracePeriodSeconds"] >= int(before) + 2 * SERVED["drain"] + stopped


def test_the_variant_for_a_gpu_asks_for_one() -> None:
    overlay = yaml.safe_load((FOLDER / "gpu" / "kustomization.yaml").read_text(encoding="utf-8"))
    assert overlay["resources"] == ["../cpu"]
    (patch,) = overlay["patches"]
    changes = yaml.safe_load(patch["patch"])
    assert {one["op"] for one in changes} == {"add"}
    added = {one["path"].partition("/containers/0/")[2]: one["value"] for one in changes}
    assert added.pop("resources/limits/nvidia.com~1gpu") == 1
    assert parsed([*CONTAINER["args"], added.pop("args/-")])["device"] == "cuda"
    assert not added
    (image,) = overlay["images"]
    assert CONTAINER["image"].startswith(f"{image['name']}:")
