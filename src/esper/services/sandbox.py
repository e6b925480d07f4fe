"""Work that may go wrong in any way, done in a child process that cannot take anybody with it.

A *host* process imports what the work needs once, and forks a child for each piece of it: 0.4 s
instead of seconds. The child has limits on memory and processor time, the host a deadline and a
limit on what it reads. Whatever the child has started and left behind becomes the host's own child
(it is a subreaper), and is killed with it, before the answer is given.

What it answers goes to a registry, where others read it, so what it can read matters: of the
environment the host has what Python and torch need, and no token.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from esper.services.settings import environment_of_a_sandbox

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

Confinement = Literal["auto", "bwrap", "process"]
"""Whether the host runs inside of bubblewrap: where that works, always, or never."""

LENGTH: Final = struct.Struct("!Q")
"""How long what follows is, before each message in either direction."""

_ENDING_S: Final = 1.0
_PR_SET_DUMPABLE: Final = 4
_HOMES: Final = Path("/home")
_HIDDEN: Final = tuple(
    folder
    for folder in (Path("/tmp"), _HOMES, Path("/root"), Path("/run"))  # noqa: S108 - as it is meant
    if folder.is_dir() and not folder.is_symlink()
)
"""Where files of everybody and of users lie, and where secrets are mounted; empty inside."""
_BWRAP: Final = (
    "bwrap",
    *("--ro-bind", "/", "/"),
    *("--dev", "/dev"),
    *("--proc", "/proc"),
    *(word for folder in _HIDDEN for word in ("--tmpfs", str(folder))),
    *("--unshare-all", "--die-with-parent", "--new-session"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What one piece of work may take.

    Attributes:
        memory_bytes: Beyond what the host holds when it forks, above 0.
        seconds: Of wall time, above 0; of processor time, rounded up, as many.
        answer_bytes: Longest answer, above 0.

    Raises:
        ValueError: A limit is not above 0.
    """

    memory_bytes: int = 2 * 2**30
    seconds: float = 60.0
    answer_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "seconds", "answer_bytes"):
            if not getattr(self, name) > 0:
                msg = f"{name} is above 0, got {getattr(self, name)!r}"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The work was done.

    Attributes:
        data: What it returned.
    """

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The work was not done.

    Attributes:
        reason: Why, in a sentence.
        is_ours: Whether it was the host that failed and not the work: it may be done again.
    """

    reason: str
    is_ours: bool = False


class Sandbox:
    """Does one piece of work after the other, each in a child of its own.

    Args:
        work: ``module:function`` of a function from bytes to bytes. What its module imports is
            imported once; a function ``warm_up`` in it is called once, before any work.
        limits: What each piece may take.
        confinement: Whether the host runs inside of bubblewrap, where it sees no network and can
            write no file.

    Raises:
        OSError: The host cannot be started, or bubblewrap was asked for and does not work.
    """

    def __init__(
        self,
        work: str,
        *,
        limits: SandboxLimits | None = None,
        confinement: Confinement = "auto",
    ) -> None:
        self._work = work
        self._limits = limits or SandboxLimits()
        self._inside = _inside_of(confinement)
        self._host = self._started()

    @property
    def is_confined(self) -> bool:
        """Whether the work runs inside of bubblewrap."""
        return bool(self._inside)

    def run(self, payload: bytes) -> Answered | Broken:
        """Do one piece of work; what goes wrong in it is an answer, and never raised."""
        if self._host.poll() is not None or (self._host.stdin and self._host.stdin.closed):
            _end(self._host)
            self._host = self._started()
        try:
            _write(self._host, payload)
            header = json.loads(_read(self._host))
            return (
                Answered(data=_read(self._host))
                if header["is_done"]
                else Broken(reason=header["reason"])
            )
        except (OSError, EOFError, ValueError) as error:
            _end(self._host)
            return Broken(reason=f"the process that runs the work ended: {error}", is_ours=True)

    def interrupt(self) -> None:
        """End the work that another thread waits for; ``run`` answers there that it was not done.

        The host ends with it, and the next piece of work starts another.
        """
        if self._host.stdin is not None:
            with suppress(BrokenPipeError):
                self._host.stdin.close()

    def close(self) -> None:
        """End the host and every child of it."""
        _end(self._host)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        limits = self._limits
        told = (self._work, limits.memory_bytes, limits.seconds, limits.answer_bytes)
        host = subprocess.Popen(  # noqa: S603 - our own module, and numbers
            [*self._inside, sys.executable, "-m", "esper.services.sandbox_host", *map(str, told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment_of_a_sandbox(),
        )
        try:
            if _read(host) != b"ready":
                msg = f"the sandbox's host for {self._work} did not start"
                raise OSError(msg)
        except EOFError as error:
            _end(host)
            msg = f"the sandbox's host for {self._work} ended with exit code {host.returncode}"
            raise OSError(msg) from error
        return host


def _end(host: subprocess.Popen[bytes]) -> None:
    """End a host, if it has not ended; its children die with it: each has asked for that."""
    for pipe in (host.stdin, host.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    try:
        host.wait(_ENDING_S)  # it ends by itself where nobody speaks to it any more
    except subprocess.TimeoutExpired:
        host.kill()
        host.wait()


def _write(host: subprocess.Popen[bytes], data: bytes) -> None:
    assert host.stdin is not None
    host.stdin.write(LENGTH.pack(len(data)) + data)
    host.stdin.flush()


def _read(host: subprocess.Popen[bytes]) -> bytes:
    assert host.stdout is not None
    head = host.stdout.read(LENGTH.size)
    if len(head) < LENGTH.size:
        msg = "it said no more"
        raise EOFError(msg)
    (length,) = LENGTH.unpack(head)
    data = host.stdout.read(length)
    if len(data) < length:
        msg = "it ended in the middle of an answer"
        raise EOFError(msg)
    return data


def _inside_of(confinement: Confinement) -> Sequence[str]:
    """Return what the host's command begins with.

    Raises:
        OSError: Bubblewrap was asked for and does not work.
    """
    if confinement == "process":
        return ()
    reason = why_no_bubblewrap()
    if reason is None:
        return (*_BWRAP, *_code_in_hidden_folders())
    if confinement == "bwrap":
        msg = f"{reason}; use the sandbox 'process', which has the same limits, or install it"
        raise OSError(msg)
    return ()


def _code_in_hidden_folders() -> Sequence[str]:
    """Return what shows Python and its modules inside, where they lie in a folder that is hidden.

    An environment that was made there is as good as any; what else is there stays out of sight.
    """
    package = Path(__file__).parents[2]
    named = {sys.prefix, sys.base_prefix, str(package), *filter(None, sys.path)}
    paths = {place for path in map(Path, named) for place in (path.absolute(), path.resolve())}
    found = sorted(
        str(path)
        for path in paths
        if path.exists()
        and any(folder in path.parents for folder in _HIDDEN)
        and path.parent != _HOMES  # all that a user has: where ``python -m`` was started
    )
    return [word for path in found for word in ("--ro-bind", path, path)]


def hide_from_other_processes() -> None:
    """Let no process of the same user read this one's environment and memory, for good.

    Who has the capability ``SYS_PTRACE`` still can. No core is dumped, and no debugger attached.

    Raises:
        OSError: The system does not do it.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        msg = "the worker's environment and memory cannot be hidden from its sandbox"
        raise OSError(number, msg)


def why_no_bubblewrap() -> str | None:
    """Say why bubblewrap cannot be used here, or nothing: it is tried."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (the program bwrap)"
    tried = subprocess.run(  # noqa: S603 - a program of the machine's, by its name
        [*_BWRAP, "true"], capture_output=True, timeout=10, check=False
    )
    if tried.returncode == 0:
        return None
    return f"bubblewrap does not work here: {tried.stderr.decode(errors='replace').strip():.200}"
