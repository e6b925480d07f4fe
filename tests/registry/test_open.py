"""One address, one registry."""

import subprocess
import sys
from pathlib import Path

import pytest
from kernel_artifacts import artifact

from esper import registry
from esper.contracts.errors import KernelSourceUnavailable
from esper.registry.memory import MemoryRegistry


def test_memory_is_a_registry_of_its_own_every_time():
    """Two memory registries share nothing."""
    first, second = registry.open_registry("memory:"), registry.open_registry("memory:")
    digest = first.put(artifact(1))

    assert isinstance(first, MemoryRegistry)
    assert not second.exists(digest)


@pytest.mark.parametrize("spelling", [str, Path, Path.as_uri], ids=["text", "path", "file"])
def test_a_directory_may_be_a_path_or_a_file_address(tmp_path, spelling):
    """Every spelling of a directory, blanks included, leads to what was published there."""
    folder = tmp_path / "my kernels" / "deep"
    first = registry.open_registry(folder)
    digest = first.put(artifact(1))
    first.close()

    again = registry.open_registry(spelling(folder))

    assert again.get(digest) == artifact(1)
    again.close()


@pytest.mark.parametrize(
    "address", ["", "memory:x", "http:/localhost/", "s3://bucket", "file://host/x", "file:x"]
)
def test_other_addresses_are_refused(address, tmp_path, monkeypatch):
    """An address that this build cannot serve is never taken for a directory's name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"expected(?!.*open_registry)"):
        registry.open_registry(address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", [3, None, b"memory:"])
def test_an_address_of_another_type_is_refused(address, tmp_path, monkeypatch):
    """What is no address is not made into the name of a directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="the address of a registry is a str or a Path; got"):
        registry.open_registry(address)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_registry(tmp_path):
    """To try again would help nobody; the file stays as it is."""
    place = tmp_path / "kernels.tar"
    place.write_text("in the way")
    with pytest.raises(ValueError, match=r"kernels\.tar.* is no directory"):
        registry.open_registry(place)
    assert place.read_text() == "in the way"


def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path):
    """Where the disk does not do its part, the error says so and names the place."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KernelSourceUnavailable, match="file"):
        registry.open_registry(tmp_path / "file" / "store")


def test_the_registry_needs_no_torch():
    """Opening and using a registry imports neither torch nor numpy."""
    code = (
        "import sys; from esper import registry; registry.open_registry('memory:').search();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
