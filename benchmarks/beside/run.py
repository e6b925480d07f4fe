"""``make bench-peers``: what peers' users complain of, run on the peer and on Esper, side by side.

Each peer is installed into an environment of its own under ``.venv-peers/``, on top of the one that
runs this, since some cannot live beside one another. One that cannot be installed, or whose
comparison fails, is named with the reason. Prints what it finds, and writes
``benchmarks/results/peers/<environment>.json`` and ``docs/peers.md``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import document
import torch

import esper

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".venv-peers"
PEERS = {
    "peft": "peft==0.21.2",
    "gromo": "gromo==0.1.0",
    "adapters": "adapters==1.3.0",
    "avalanche": "avalanche-lib==0.6.0",
    "kernels": "kernels==0.17.2",
}
"""The peers, each with what pip installs; ``<name>_rows.py`` has its comparisons."""
WITH_ITS_OWN_TORCH = {"avalanche"}
"""Peers that need torchvision, of which PyPI has no build for a torch without CUDA."""
LIMIT_S = 1_800
"""Seconds that an installation, or the comparisons with a peer, may take."""


class PeerError(Exception):
    """A peer cannot be installed, or its comparisons do not come to an end."""


def main() -> None:
    """Compare with every peer, or those that are named, and write what was found."""
    options = _options()
    found = [_compared(name) for name in options.peers or PEERS]
    result = {"format_version": document.FORMAT_VERSION, "environment": _environment()}
    folder = options.out or document.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{platform.system()}-{platform.machine()}-torch-{torch.__version__}".lower()
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**result, "peers": found}, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {path}")
    if options.out is None and not options.peers:
        document.write()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare Esper with its peers.")
    parser.add_argument("peers", nargs="*", help=f"only these of {sorted(PEERS)}")
    parser.add_argument("--out", type=Path, help="a folder for the JSON, without the document")
    return parser.parse_args()


def _environment() -> dict[str, str]:
    return {
        "esper": esper.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _compared(name: str) -> dict[str, Any]:
    """Return what was found beside a peer, or why nothing was."""
    print(f"{PEERS[name]}:", flush=True)
    try:
        python = _installed(name)
        rows, version = list(_rows(python, name)), _torch_of(python)
    except PeerError as error:
        print(f"  {error}", flush=True)
        return {"peer": PEERS[name], "torch": "", "rows": [], "absent": str(error)}
    for row in rows:
        print(f"  {row.get('failed') or '{asked}: {peer} | {esper}'.format(**row)}", flush=True)
    return {"peer": PEERS[name], "torch": version, "rows": rows, "absent": ""}


def _installed(name: str) -> Path:
    """Return the Python of a peer's environment, which stands on that of this process.

    Raises:
        PeerError: It cannot be installed.
    """
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = folder / "lib" / version / "site-packages"
        below = sysconfig.get_path("purelib")
        line = f"import site; site.addsitedir({below!r})\n"  # its .pth files too
        (packages / "below.pth").write_text(line, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    pinned = [] if name in WITH_ITS_OWN_TORCH else [f"torch=={metadata.version('torch')}"]
    _checked([*pip, PEERS[name], *pinned], f"{PEERS[name]} could not be installed")
    return python


def _torch_of(python: Path) -> str:
    """Return the version of torch that stands in an environment."""
    code = "from importlib.metadata import version; print(version('torch'))"
    return _checked([str(python), "-c", code], "its torch has no version").strip()


def _rows(python: Path, name: str) -> Iterator[dict[str, str]]:
    """Yield the comparisons with a peer, made in its environment."""
    script = str(HERE / f"{name}_rows.py")
    printed = _checked([str(python), script], f"the comparisons with {PEERS[name]} broke off")
    for line in printed.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def _checked(command: list[str], what: str) -> str:
    """Run a command and return what it prints.

    Raises:
        PeerError: It fails, or takes too long; with the last line of what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603 - commands of this file alone
            command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{what}: it took over {LIMIT_S} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said"]
        errors = [line for line in said if line.startswith("ERROR")]
        raise PeerError(f"{what}: {(errors or said)[-1]}")
    return done.stdout


if __name__ == "__main__":
    main()
