"""Work that goes wrong in every way that a sandbox has to survive; the payload says which."""

import ctypes
import os
import socket
import time
from pathlib import Path

WARM = []


def warm_up():
    WARM.append(os.getpid())


def work(payload):
    kind, _, argument = payload.decode().partition(" ")
    return globals()[f"_{kind}"](argument)


def _echo(argument):
    return argument.encode()


def _host(_):
    return f"{WARM[0]} {os.getppid()}".encode()


def _memory(_):
    return bytes(bytearray(8 * 2**30)[:1])


def _cpu(_):
    while True:
        pass


def _sleep(_):
    time.sleep(1e6)


def _crash(_):
    ctypes.string_at(0)


def _leave(_):
    os._exit(17)


def _fail(_):
    raise ValueError("this blueprint is poison")


def _flood(_):
    return bytes(2**24)


def _print(argument):
    os.write(1, argument.encode())
    return b"printed"


def _write(path):
    Path(path).write_text("written")
    return b"written"


def _connect(port):
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5):
        return b"connected"


def _seen(path):
    return str(Path(path).exists()).encode()


def _read(path):
    return Path(path).read_bytes()


def _listed(folder):
    return "\n".join(path.name for path in Path(folder).iterdir()).encode()


def _environment(_):
    """Return the environments of this process, of its host and of whoever started that."""
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    starter = next(line.split()[1] for line in status.splitlines() if line.startswith("PPid"))
    return "\n".join(map(_environment_of, ("self", os.getppid(), starter))).encode()


def _environment_of(process):
    try:
        return repr(Path(f"/proc/{process}/environ").read_bytes())
    except OSError as error:
        return type(error).__name__


def _detach(folder):
    """Leave forty processes behind, each in a session of its own, that write their numbers."""
    for _ in range(40):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            (Path(folder) / str(os.getpid())).write_text("")
            time.sleep(1e6)
    while len(list(Path(folder).iterdir())) < 40:
        time.sleep(0.01)
    return b"detached"
