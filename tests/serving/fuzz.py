"""What the OpenAPI document allows, and what it does not, sent to a server by schemathesis; see `make fuzz`.

No answer is a 500, none takes long, and none has a traceback or a folder in it.

    python -m tests.serving.fuzz --address http://127.0.0.1:8000 --cases 2000
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from contextlib import suppress
from typing import Any
from unittest import SkipTest

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

HANG_S = 10.0
BODIES, OTHERS = 0.4, 0.08  # shares of an operation, of cases that are allowed and again of those that are not
LEAKS = re.compile(r'Traceback|File "|site-packages|/(?:home|root|tmp|usr|work)/')


def fuzz(address: str, cases: int) -> dict[str, Any]:
    """At least that many cases, most of them bodies; returns the statuses there were, and what was wrong."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    statuses: Counter[str] = Counter()
    wrong: set[str] = set()

    def check(case: Any) -> None:
        answer = case.call(base_url=address, timeout=HANG_S)
        statuses[f"{case.method} {case.path} {answer.status_code}"] += 1
        told = answer.text if not case.path.endswith("/content") else ""
        if answer.status_code == 500 or LEAKS.search(told):
            wrong.add(f"{case.method} {case.formatted_path}: {answer.status_code} {told[:200]}")
        elif str(answer.status_code) not in case.operation.definition.raw["responses"]:
            wrong.add(f"{case.method} {case.path}: {answer.status_code} is not in the document")

    for operation in operations:
        share = BODIES if operation.body else OTHERS
        some = settings(
            max_examples=int(cases * share),
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            with suppress(Unsatisfiable, SkipTest):  # anything is allowed there
                some(given(case=operation.as_strategy(generation_mode=mode))(check))()
    return {"cases": sum(statuses.values()), "statuses": dict(sorted(statuses.items())), "wrong": sorted(wrong)}


def main() -> int:
    """Run it, print one JSON document; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--cases", type=int, default=2000)
    options = parser.parse_args()
    found = fuzz(options.address, options.cases)
    print(json.dumps(found, indent=1))  # noqa: T201
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
