"""The process that forks a child for each piece of work; see :mod:`esper.services.sandbox`.

Run as ``python -m esper.services.sandbox_host module:function memory seconds answer``. It reads
messages from its standard input, each with its length before it, and answers each with two: whether
the work was done, as JSON, and what it returned.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NoReturn

from esper.services.sandbox import LENGTH, SandboxLimits

if TYPE_CHECKING:
    from collections.abc import Callable

    Work = Callable[[bytes], bytes]

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)
_NO_CAPABILITIES: Final = bytes(24)
_CHUNK: Final = 2**20
_FAILED: Final = 3
"""Exit code of a child whose work raised; what it wrote is the message."""


def main() -> None:
    """Import the work, and do it as often as it is asked for."""
    work = _work_named(sys.argv[1])
    memory_bytes, seconds, answer_bytes = sys.argv[2:]
    limits = SandboxLimits(
        memory_bytes=int(memory_bytes), seconds=float(seconds), answer_bytes=int(answer_bytes)
    )
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the work prints is no answer
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who stops the worker ends this by its pipe
    _send(answers, b"ready")
    while True:
        payload = _received(requests)
        if payload is None:
            return
        try:
            reason, data = _done(work, payload, limits)
            header = {"is_done": not reason, "reason": reason}
            _send(answers, json.dumps(header).encode())
            if not reason:
                _send(answers, data)
        except (EOFError, BrokenPipeError):  # nobody waits for it any more
            os._exit(0)


def _work_named(name: str) -> Work:
    module_name, _, function = name.partition(":")
    module = importlib.import_module(module_name)
    warm_up = getattr(module, "warm_up", None)
    if warm_up is not None:
        warm_up()
    work: Work = getattr(module, function)
    return work


def _done(work: Work, payload: bytes, limits: SandboxLimits) -> tuple[str, bytes]:
    """Do one piece of work in a child; return why it was not done, or its answer."""
    reading, writing = os.pipe()
    reason, data = "the host was interrupted", b""
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work_in_child(work, payload, limits, writing)
    os.close(writing)
    try:
        reason, data = _answer(reading, child, limits)
    finally:
        os.close(reading)
        status = _end(child, may_go_on=not reason)
    return reason or _what_ended(status, data, limits), data


def _work_in_child(work: Work, payload: bytes, limits: SandboxLimits, writing: int) -> NoReturn:
    """Do the work within its limits, and write what it returns."""
    code = _FAILED
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit(limits)
        _give_up_capabilities()
        data = work(payload)
        code = 0
    except BaseException as error:  # noqa: BLE001 - the end of a process, whatever it was
        data = f"{type(error).__name__}: {error!s:.2000}".encode()
    with suppress(OSError):
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(writing, rest) :]
    os._exit(code)


def _limit(limits: SandboxLimits) -> None:
    held = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    memory = held + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    seconds = math.ceil(limits.seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _give_up_capabilities() -> None:
    """Let root be a user as any other, who reads no memory of a process that has more than it.

    Raises:
        OSError: The system does not do it.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(_CAPABILITY_HEADER, _NO_CAPABILITIES) != 0:
        msg = "the work's capabilities cannot be given up"
        raise OSError(ctypes.get_errno(), msg)


def _answer(reading: int, child: int, limits: SandboxLimits) -> tuple[str, bytes]:
    """Read until the child has ended, it says too much, or its time is over.

    Its pipe does not end with it where processes that it has left behind hold it open. Who asked
    says nothing before it has its answer: what can be read from it then is that it has ended.

    Raises:
        EOFError: Nobody waits for the answer any more.
    """
    asking = sys.stdin.fileno()
    until_s = time.monotonic() + limits.seconds
    parts: list[bytes] = []
    size, ended = 0, os.pidfd_open(child)
    try:
        while True:
            left_s = max(0.0, until_s - time.monotonic())
            ready = select.select([reading, ended, asking], [], [], left_s)[0]
            if not ready:
                return f"it took longer than {limits.seconds:g} s", b""
            if asking in ready:
                raise EOFError
            part = os.read(reading, _CHUNK) if reading in ready else b""
            if not part:
                return "", b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > limits.answer_bytes:
                return f"its answer is longer than {limits.answer_bytes} bytes", b""
    finally:
        os.close(ended)


def _end(child: int, *, may_go_on: bool) -> int:
    """Let a child end that has said all, kill any other, and all that it has left behind."""
    if not may_go_on:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    while left := _children():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(-1, 0)
    return status


def _children() -> list[int]:
    own = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


def _what_ended(status: int, data: bytes, limits: SandboxLimits) -> str:
    """Say why a child ended that had said all; empty where its work was done."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return f"it took more than {limits.seconds:g} s of processor time, or was killed"
        return f"it was ended by {signal.Signals(number).name}"
    if os.WEXITSTATUS(status) == _FAILED:
        return data.decode(errors="replace")
    return "" if os.WEXITSTATUS(status) == 0 else f"it exited with {os.WEXITSTATUS(status)}"


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _received(requests: BinaryIO) -> bytes | None:
    head = requests.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return requests.read(LENGTH.unpack(head)[0])


def _send(answers: BinaryIO, data: bytes) -> None:
    answers.write(LENGTH.pack(len(data)) + data)
    answers.flush()


if __name__ == "__main__":
    main()
