"""Logs as lines of JSON, which have no prompts in them."""

from __future__ import annotations

import json
import logging
import sys
import time

OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # what every record has


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and what else the caller told."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in OWN},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json() -> None:
    """Let this process log so, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("foresight").setLevel(logging.INFO)
