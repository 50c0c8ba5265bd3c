"""The entry of the command line: `foresight` where it is installed, `python cli.py` in a clone; the rest is commands/.

Results go to stdout (with --json as one JSON document), everything else to stderr. Exit codes: 0 done, 1 failed,
2 usage, 3 bundle or engine missing or incompatible, 4 integrity, 130 interrupted, 143 terminated. Where the reader of
stdout goes away, as `head` does, the command ends with 1 and says nothing.
"""

from __future__ import annotations

import os
import sys

try:
    from pathlib import Path

    import click  # noqa: F401 - first of what has to be installed

    from foresight.commands.console import main
except ModuleNotFoundError as missing:  # run from a clone, by a Python that nothing was installed into
    _python = Path(__file__).resolve().parent / ".venv" / "bin" / "python"
    if __name__ == "__main__" and _python.exists() and Path(sys.prefix) != _python.parents[1]:
        os.execv(_python, [str(_python), *sys.argv])  # the one that make installed everything into
    sys.exit(f"{missing.name} is not installed; run: pip install -e '.[export,video,report]' -c constraints.txt")
except KeyboardInterrupt:
    sys.stderr.write("error: interrupted\n")
    sys.exit(130)

__all__ = ["main"]

if __name__ == "__main__":
    main()
