"""Every registry, and artifacts to put into them."""

import secrets

import pytest
import real_servers
from far_registries import cached_in_memory
from registries import in_a_directory, in_memory, of_a_team, of_images, of_the_hub, on_a_server


class WallClock:
    """Seconds since 1970 that a test sets."""

    def __init__(self):
        self.now_s = 1_000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def wall():
    return WallClock()


@pytest.fixture(scope="session")
def needs_server():
    """Skip where the extra is not installed."""
    pytest.importorskip("fastapi", reason="needs the extra server")


@pytest.fixture(scope="session")
def postgres():
    """Return the address of a PostgreSQL."""
    with real_servers.postgres() as address:
        yield address


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """Return the address of a bucket, and how it is reached."""
    objects = pytest.importorskip("esper.registry.object_blobs", reason="needs the extra s3")
    with real_servers.seaweed(tmp_path_factory.mktemp("seaweed") / "server") as endpoint:
        access = objects.BucketAccess(endpoint=endpoint, access_key="esper", secret_key="secret")
        yield "s3://kernels", access


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Return host and port of a registry of images that everybody may write to."""
    with real_servers.docker_registry(tmp_path_factory.mktemp("images") / "server") as address:
        yield address


@pytest.fixture
def database(postgres):
    """Return a PostgreSQL with nothing in it."""
    made = pytest.importorskip("esper.registry.postgres").PostgresDatabase(postgres)
    made.rows("DROP SCHEMA public CASCADE")
    made.rows("CREATE SCHEMA public")
    yield made
    made.close()


@pytest.fixture
def objects(bucket):
    """Return a blob store of this test's own, with nothing in it."""
    from esper.registry.object_blobs import ObjectBlobs, open_bucket

    url, access = bucket
    prefix = secrets.token_hex(8)
    store = ObjectBlobs(open_bucket(f"{url}/{prefix}", access), f"{url}/{prefix}")
    part = store.receive()
    part.seal("0" * 64)  # this S3 makes a bucket by the first thing that is put there
    part.discard()
    store.remove("0" * 64)
    return store


@pytest.fixture(
    params=[
        pytest.param(in_memory, id="memory"),
        pytest.param(in_a_directory, id="directory"),
        pytest.param(cached_in_memory, id="cached"),
        pytest.param(of_the_hub, id="hub", marks=pytest.mark.slow),
        pytest.param(on_a_server, id="http", marks=pytest.mark.slow),
        pytest.param(of_a_team, id="postgresql and s3", marks=pytest.mark.slow),
        pytest.param(of_images, id="oci", marks=pytest.mark.slow),
    ]
)
def registry(request, wall):
    """Return each implementation of the port in turn, empty."""
    made = request.param(request, {"wall_s": wall, "max_artifact_bytes": 100_000})
    yield made
    made.close()
