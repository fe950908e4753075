"""The command line: read what is asked, join the other ranks, call the command, end in one line if it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence

import torch

from fdiff import __version__
from fdiff.comm import Communicator, LostRanks, NoRendezvous, Stranger, agree, connect
from fdiff.commands import streams
from fdiff.commands.flags import COMMANDS, Request, parse
from fdiff.commands.same_request import compare_requests
from fdiff.config import RuntimeConfig
from fdiff.errors import RunError, UserError, one_line
from fdiff.runtime import killed_for_memory, launcher, set_up

EARLY_S = 60.0  # how long ranks wait for each other to say that the request is bad


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a failed run, 2 for a bad request, 128 + n for signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    streams.take_over()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fdiff {__version__}")
        return 0
    try:
        launch = launcher.detect()
    except UserError as error:
        return _say(error)
    level = logging.INFO if launch.rank == 0 else logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(streams.PrintableFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    return _serve(arguments, launch)


def overview() -> str:
    """What `fdiff --help` prints."""
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: fdiff COMMAND [flags]", "", *lines, "", "fdiff COMMAND --help lists a command's flags."])


# --- the call ------------------------------------------------------------------------------------------------------


def _serve(arguments: list[str], launch: launcher.Launch) -> int:
    """Parse, join the other ranks if the command or a failure concerns them all, and call the command."""
    comm: Communicator | None = None
    killed_before = killed_for_memory()
    try:
        request, device, error = _prepare(arguments, launch)
        if request and request.meets_by_itself:
            request.run(**request.arguments, launch=launch)
            return 0
        if request and not request.collective:
            if launch.rank == 0:
                request.run(**request.arguments)
            return 0
        comm, error = _join(request, launch, error)
        agree(comm, error)
        assert request is not None and device is not None
        compare_requests(comm, request)
        comm.open(device, request.runtime.share_gpu)
        request.run(**request.arguments, comm=comm, device=device)
        comm.close()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _fail(error, launch, comm, killed_before)


def _prepare(
    arguments: list[str], launch: launcher.Launch
) -> tuple[Request | None, torch.device | None, UserError | RunError | None]:
    """The request and this rank's device, or what is wrong with them: the other ranks have to hear of it."""
    try:
        request = parse(arguments)
        return request, set_up(request.runtime, launch) if request.collective else None, None
    except Exception as error:
        if launch.size == 1 and not isinstance(error, UserError):
            raise  # nobody else has to hear of it, and its traceback tells more
        return None, None, one_line(error)


def _join(
    request: Request | None, launch: launcher.Launch, error: UserError | RunError | None
) -> tuple[Communicator, UserError | RunError | None]:
    """Meet the other ranks; if the runtime asked for does not fit, meet by the default one to say so."""
    early, folder = RuntimeConfig(timeout_s=EARLY_S), request.folder if request else None
    try:
        return connect(request.runtime if request else early, launch, folder), error
    except Stranger as stranger:
        raise error or stranger from None
    except UserError as refused:
        return connect(early, launch, folder), refused


def _fail(error: BaseException, launch: launcher.Launch, comm: Communicator | None, killed_before: int) -> int:
    """End a failed command: what all ranks know one of them says, what only this one knows it says itself.

    `killed_before` processes had been killed for want of memory when it began.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    if comm is None or getattr(error, "agreed", False):
        alone = comm is None and isinstance(error, (Stranger, NoRendezvous, LostRanks))
        status = _say(error, speaks=alone or launch.rank == 0)
        if comm is not None:
            with contextlib.suppress(Exception):
                comm.close()
            if any(t is not threading.main_thread() and not t.daemon for t in threading.enumerate()):
                os._exit(status)  # a disk that a writer waits for may never answer
        return status
    speaker = error.speaker if isinstance(error, LostRanks) else comm.rank
    if isinstance(error, LostRanks) and error.ranks and killed_for_memory() > killed_before:
        error = RunError(f"{error}; the kernel has killed a process of this job for want of memory")
    status = _say(error, speaks=comm.rank == speaker)
    comm.abort()
    if comm.size > 1:
        os._exit(status)  # a backend's threads may still wait for a rank that is gone
    return status


def _say(error: BaseException, speaks: bool = True) -> int:
    """Print an error, ours in one line, and return its exit status."""
    if isinstance(error, OSError) and error.filename is not None:
        error = one_line(error)
    if speaks and isinstance(error, (UserError, RunError)):
        print(f"fdiff: error: {one_line(error)}", file=sys.stderr, flush=True)
    elif speaks:
        traceback.print_exception(error)
        sys.stderr.flush()
    return getattr(error, "status", 1)
