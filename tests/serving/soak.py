"""A server under mixed, cancelled, failing and refused requests for as long as it is told; see `make soak`.

Every job that was accepted ends; what is finished has the bytes that a pipeline of this process makes; and the memory
of the server and its worker stays where it was after the warm-up, the first quarter of the time.

    python -m tests.serving.soak --bundle bundles/latte-demo --minutes 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

import foresight
from foresight.runtime.policies.notation import policy_from_text
from tests.serving import faulty
from tests.serving.apart import free_port, serving, wait_until_ready

CLIENTS = 3
MOST_GROWTH = 0.02
HANG_S = 120.0  # until a job has ended, however busy the machine is
BODIES: tuple[dict[str, Any], ...] = tuple(
    {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": guidance, "policy": policy, "seed": seed}
    for seed, (prompt, steps, guidance, policy) in enumerate(
        [
            ("a red circle moving right", 6, 4.0, "foresight"),
            ("a blue square moving left", 8, 1.0, "forecast"),
            ("a dog", 4, 4.0, "none"),
            ("a green triangle moving up", 10, 2.0, "static"),
        ]
    )
)
REFUSED: tuple[dict[str, Any], ...] = ({}, {"prompt": "a", "size": "1x1"}, {"prompt": "a", "policy": "none:x=1"})


@dataclass
class Soak:
    """What the clients share: the references, what was counted, and what went wrong."""

    address: str
    fault: Path
    references: list[bytes]
    ends: float
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def client(self, number: int) -> None:
        """One client, until the time is over."""
        chance = random.Random(number)
        with httpx.Client(base_url=self.address, timeout=HANG_S) as http:
            while time.monotonic() < self.ends:
                act = chance.choices([self.make, self.cancel, self.fail, self.refuse], [6, 2, 2, 1])[0]
                try:
                    act(http, chance)
                except Exception as error:  # noqa: BLE001 - it is told at the end
                    self.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")

    def make(self, http: httpx.Client, chance: random.Random) -> None:
        """A video is as its reference, or a fault that was laid for another request has struck this one."""
        which = chance.randrange(len(BODIES))
        job = http.post("/v1/videos", json=BODIES[which]).raise_for_status().json()["id"]
        gives_up = time.monotonic() + HANG_S
        while (video := http.get(f"/v1/videos/{job}").json())["status"] in ("queued", "in_progress"):
            assert time.monotonic() < gives_up, f"{job} has not ended"
            time.sleep(0.05)
        if video["status"] == "completed":
            content = http.get(f"/v1/videos/{job}/content").content
            same = content == self.references[which]
            steps = http.get(f"/v1/videos/{job}/skipped").json()["steps"]
            assert same, f"{job} differs from its reference: {BODIES[which]}, {len(content)} bytes, steps {steps}"
        else:
            assert video["error"]["code"] in ("engine_error", "out_of_memory"), video["error"]
        self.counts[video["status"]] += 1
        if chance.random() < 0.9:  # some stay
            http.delete(f"/v1/videos/{job}").raise_for_status()

    def cancel(self, http: httpx.Client, chance: random.Random) -> None:
        """A job that is deleted anywhere on its way is gone."""
        body = {**chance.choice(BODIES), "num_inference_steps": 100, "policy": "none"}
        job = http.post("/v1/videos", json=body).raise_for_status().json()["id"]
        time.sleep(chance.random())
        http.delete(f"/v1/videos/{job}").raise_for_status()
        assert http.get(f"/v1/videos/{job}").status_code == 404
        self.counts["cancelled"] += 1

    def fail(self, http: httpx.Client, chance: random.Random) -> None:
        """An engine of whichever request begins next fails."""
        own = self.fault.with_suffix(f".{threading.get_ident()}")
        own.write_text(f"block.{chance.randrange(4):03d} {chance.randrange(2)} {chance.choice(faulty.KINDS)}")
        os.replace(own, self.fault)
        self.make(http, chance)

    def refuse(self, http: httpx.Client, chance: random.Random) -> None:
        """A request that makes no sense is refused."""
        assert http.post("/v1/videos", json=chance.choice(REFUSED)).status_code == 400
        self.counts["refused"] += 1


def references(bundle: Path) -> list[bytes]:
    """The videos of all bodies, made here."""
    with foresight.load(bundle, threads=1) as pipeline:
        return [
            pipeline(
                body["prompt"],
                steps=body["num_inference_steps"],
                guidance=body["guidance_scale"],
                policy=policy_from_text(body["policy"]),
                seed=body["seed"],
            ).to_bytes("mp4")
            for body in BODIES
        ]


def memory_of(pid: int) -> dict[str, int]:
    """Resident bytes of the server, and of its worker."""
    server = psutil.Process(pid)
    workers = [child for child in server.children() if "spawn_main" in " ".join(child.cmdline())]
    return {"server": server.memory_info().rss, "worker": sum(child.memory_info().rss for child in workers)}


def soak(bundle: Path, minutes: float) -> dict[str, Any]:
    """Run it; returns what was counted, and how memory has grown."""
    made = references(bundle)
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        command = [sys.executable, "-m", "tests.serving.soak", "--bundle", str(bundle), "--serve", f"{folder}:{port}"]
        environment = {**os.environ, faulty.FAULT: str(folder / "fault")}
        with subprocess.Popen(command, env=environment) as process:
            address = f"http://127.0.0.1:{port}"
            wait_until_ready(address)
            began = time.monotonic()
            run = Soak(address, folder / "fault", made, began + 60 * minutes)
            threads = [threading.Thread(target=run.client, args=(number,)) for number in range(CLIENTS)]
            for thread in threads:
                thread.start()
            samples = []
            while any(thread.is_alive() for thread in threads):
                samples.append(memory_of(process.pid))
                time.sleep(1)
            left = httpx.get(f"{address}/v1/videos", params={"limit": 100}).json()["data"]
            run.wrong += [f"{job['id']} has not ended" for job in left if job["status"] not in ("completed", "failed")]
            process.terminate()
    return {"minutes": minutes, **run.counts, "memory": _growth(samples), "wrong": run.wrong}


def _growth(samples: list[dict[str, int]]) -> dict[str, Any]:
    """Medians of the second and the last quarter, in MiB, and by what share the latter is larger."""
    quarter = max(1, len(samples) // 4)
    grown = {}
    for name in samples[0]:
        values = [sample[name] / 2**20 for sample in samples]
        before, after = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
        grown[name] = {"before_mib": round(before, 1), "after_mib": round(after, 1), "growth": after / before - 1}
    return grown


def serve(bundle: Path, place: str) -> None:
    """The server: the usual one, whose worker's engines fail when they are told to."""
    folder, _, port = place.rpartition(":")
    serving(bundle, Path(folder) / "data", int(port), faulty.main)


def main() -> int:
    """Run it, print one JSON line; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/latte-demo"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.bundle, options.serve)
        return 0
    found = soak(options.bundle, options.minutes)
    print(json.dumps(found))  # noqa: T201
    grown = [name for name, row in found["memory"].items() if row["growth"] > MOST_GROWTH]
    return 1 if grown or found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
