"""Started by torchrun: runs the requests of a JSON file in turn, each in a fork with a rendezvous of its own.

Beside the file it leaves result-I-RANK (the exit status) and what the request printed, .out and .err.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fdiff.commands.main import main


def run(request: list[str], result: Path) -> int:
    """The request in a child process; its exit status, or 128 plus the signal that ended it."""
    child = os.fork()
    if child == 0:
        for stream, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(result.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        status = 70
        try:
            status = main(request)
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    plan = Path(sys.argv[1])
    for i, request in enumerate(json.loads(plan.read_text())):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)
        target = plan.with_name(f"result-{i}-{os.environ['RANK']}")
        target.write_text(str(run(request, target)))
