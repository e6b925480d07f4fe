"""Kernels in a registry of images: what it cannot do, where it may lead, and who may ask."""

import httpx2
import pytest
import real_servers
from kernel_artifacts import artifact
from misbehaving_servers import DATA, DIGEST, Cut, serving, whole

from esper import registry as registries
from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceUnavailable,
)
from esper.registry.cached_registry import CachedRegistry
from esper.registry.disk_cache import DiskCache
from esper.registry.oci_registry import OciRegistry

pytestmark = pytest.mark.network

BLOB = f"/v2/team/kernels/blobs/sha256:{DIGEST}"
USERS = "ann:$2b$04$0GDGwDWXyjX3wgdKXeWluezyyrciKn4OneQsa9ZiNbTpIqSNfiOEm\n"


def registry_of(server, **settings):
    """Return a registry of images that is one of the tests' own servers."""
    address = f"oci://127.0.0.1:{server.server_port}/team/kernels"
    return OciRegistry(address, sleep=lambda _: None, **({"timeout_s": 30.0} | settings))


@pytest.mark.parametrize(
    "address",
    [
        "oci://",
        "oci://host",
        "oci:host/x",
        "oci://u:p@host/x",
        "oci://host/Upper",
        "oci://host/x:y",
    ],
)
def test_an_address_is_a_host_and_a_repository(address):
    """Tags, digests and credentials do not belong in it."""
    with pytest.raises(ValueError, match="expected"):
        registries.open_registry(address)


def test_only_a_loopback_host_is_spoken_to_in_the_clear():
    """Everywhere else it is https."""
    urls = [
        registries.open_registry(f"oci://{host}/kernels")._session.url
        for host in ("localhost:5000", "ghcr.io", "127.0.0.1.example")
    ]
    assert [url.partition(":")[0] for url in urls] == ["http", "https", "https"]


DIGEST_2 = "1" * 64


@pytest.mark.parametrize(
    ("what", "ask"),
    [
        ("history", lambda images: images.history("mlp", "prod")),
        ("collects", lambda images: images.collect()),
        ("reports", lambda images: images.report_outcome(None)),
        ("reports", lambda images: images.report_validation(None)),
        ("moves tags", lambda images: images.tag("mlp", "prod", DIGEST, expected=None)),
        ("moves tags", lambda images: images.untag("mlp", "prod", expected=DIGEST_2)),
    ],
    ids=["history", "collect", "outcome", "validation", "guarded move", "guarded removal"],
)
def test_what_it_cannot_do_is_refused_unasked(what, ask):
    """Nothing is pretended: the refusal says what does it."""
    images = registries.open_registry("oci://127.0.0.1:9/kernels")
    with pytest.raises(KernelSourceRefused, match=f"{what}.*esper registry serve"):
        ask(images)


def test_a_name_and_its_tag_share_the_room_of_one_tag():
    """What would not fit is refused before anything is asked."""
    images = registries.open_registry("oci://127.0.0.1:9/kernels")
    with pytest.raises(ValueError, match="123 characters"):
        images.resolve("a" * 64 + ":" + "b" * 64)


class Login:
    """A registry that lets in who brings the token of its token server, and leads to a store."""

    def __init__(self, location="/store?signature=x", realm="/token", status=307):
        self.location, self.realm, self.status = location, realm, status

    def __call__(self, handler):
        path = handler.path.partition("?")[0]
        if path == "/token":
            handler.answer(body=b'{"token": "t0ken", "expires_in": 60}')
        elif path == "/store":
            handler.answer()
        elif handler.headers.get("Authorization") != "Bearer t0ken":
            realm = self.realm if "://" in self.realm else f"{handler.server.url}{self.realm}"
            challenge = f'Bearer realm="{realm}",service="s",scope="repository:team/kernels:pull"'
            handler.answer(401, b"{}", WWW_Authenticate=challenge)
        else:
            handler.answer(self.status, b"", Location=self.location)


@pytest.mark.parametrize("credentials", [None, "ann:s3cret", "apat"])
def test_who_is_told_to_log_in_does_so_once(credentials):
    """The token server gets the credentials, the registry the token, and the store neither."""
    with serving(Login()) as server:
        images = registry_of(server, token=credentials)
        assert [images.fetch(DIGEST) for _ in range(2)] == [DATA, DATA]

    asked = [(path, headers.get("Authorization", "")[:6]) for path, headers, _ in server.requests]
    login = "/token?service=s&scope=repository%3Ateam%2Fkernels%3Apull"
    assert asked == [
        (BLOB, ""),
        (login, "" if credentials is None else "Basic "),
        (BLOB, "Bearer"),
        ("/store?signature=x", ""),
        (BLOB, "Bearer"),
        ("/store?signature=x", ""),
    ]


@pytest.mark.parametrize(
    "location", ["http://127.0.0.2:9/x", "https://u:p@evil/x", "file:///etc/passwd", "", "//evil/x"]
)
def test_a_hop_leads_to_https_or_to_the_same_host(location):
    """Anything else is not asked."""
    with serving(Login(location)) as server:
        with pytest.raises(KernelSourceRefused, match="not followed"):
            registry_of(server).fetch(DIGEST)
        assert len(server.requests) == 3


def test_there_is_one_hop():
    """A store that leads on is refused, and so is any other redirect of the registry."""
    for login in (Login(BLOB), Login(status=301)):
        with serving(login) as server, pytest.raises(KernelSourceRefused, match="status"):
            registry_of(server).fetch(DIGEST)


def test_credentials_go_to_no_token_server_in_the_clear():
    """A realm that is neither https nor the registry's own host is not asked."""
    with serving(Login(realm="http://127.0.0.2:9/token")) as server:
        with pytest.raises(KernelSourceRefused, match="not followed"):
            registry_of(server, token="ann:s3cret").fetch(DIGEST)
        assert len(server.requests) == 1


@pytest.mark.parametrize("said", [b"[]", b"{}", b'{"token": 7}', b'{"token": "a\\r\\nb"}', b"<"])
def test_what_is_no_token_is_not_sent(said):
    """Whatever a token server says, the registry did not answer."""

    def behave(handler):
        if handler.path.startswith("/token"):
            handler.answer(body=said)
        else:
            realm = f'Bearer realm="{handler.server.url}/token"'
            handler.answer(401, b"", WWW_Authenticate=realm)

    with serving(behave) as server, pytest.raises(KernelSourceUnavailable, match="no token"):
        registry_of(server).fetch(DIGEST)


def test_who_has_no_credentials_is_refused_once():
    """A registry that wants a password is not asked again without one."""
    with serving(whole(401, b"", WWW_Authenticate='Basic realm="x"')) as server:
        with pytest.raises(KernelSourceRefused, match="401"):
            registry_of(server).fetch(DIGEST)
        assert len(server.requests) == 1


def test_a_download_goes_on_from_the_cache(tmp_path):
    """A registry that gives parts by its own tag sends every byte once."""

    class OfImages(Cut):
        tag = f'"sha256:{DIGEST}"'

    cut = OfImages(most=600)
    with serving(cut) as server:
        assert CachedRegistry(registry_of(server), DiskCache(tmp_path)).fetch(DIGEST) == DATA
    assert cut.num_sent == len(DATA)


class Forgetful:
    """A registry that has every blob, and says a few times that it knows none."""

    def __init__(self, num_refusals, code=b"MANIFEST_BLOB_UNKNOWN"):
        self.num_refusals, self.code, self.num_asked = num_refusals, code, 0

    def __call__(self, handler):
        if handler.command == "HEAD":
            handler.answer(200, b"", length=2)
        elif handler.command == "GET":
            handler.answer(404, b"")
        else:
            self.num_asked += 1
            is_refused = self.num_asked <= self.num_refusals
            refusal = b'{"errors":[{"code":"%s"}]}' % self.code
            handler.answer(*((400, refusal) if is_refused else (201, b"")))


def test_a_blob_that_another_puts_meanwhile_is_known_again_soon():
    """The manifest is sent again at once; the control: another refusal stands."""
    forgetful, refusing = Forgetful(3), Forgetful(3, b"MANIFEST_INVALID")
    with serving(forgetful) as server:
        registry_of(server).put(artifact(1))
    with serving(refusing) as server, pytest.raises(KernelSourceRefused, match="INVALID"):
        registry_of(server).put(artifact(1))
    assert (forgetful.num_asked, refusing.num_asked) == (4, 1)


def test_a_blob_that_is_unknown_for_good_is_refused():
    """After a few tries, and without minding the server's health."""
    forgetful = Forgetful(10**6)
    with serving(forgetful) as server, pytest.raises(KernelSourceRefused, match="BLOB_UNKNOWN"):
        registry_of(server).put(artifact(1))
    assert forgetful.num_asked == 10


@pytest.mark.slow
def test_others_find_a_kernel_as_the_standard_says(images):
    """A blob by its digest, in parts, and a manifest that keeps it: any client may pull it."""
    registry = registries.open_registry(f"oci://{images}/standard")
    digest = registry.put(artifact(1))
    registry.tag("mlp", "prod", digest)

    url = f"http://{images}/v2/standard"
    blob = httpx2.get(f"{url}/blobs/sha256:{digest}", trust_env=False)
    assert blob.content == artifact(1)
    assert (blob.headers["ETag"], blob.headers["Accept-Ranges"]) == (f'"sha256:{digest}"', "bytes")
    for tag in (f"sha256-{digest}", "mlp.TAG.prod"):
        accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
        manifest = httpx2.get(f"{url}/manifests/{tag}", headers=accept, trust_env=False).json()
        assert manifest["layers"][0]["digest"] == f"sha256:{digest}"


@pytest.mark.slow
def test_a_tag_that_is_taken_away_takes_no_other_with_it(images):
    """Every tag has a manifest of its own, since a manifest goes with all its tags."""
    registry = registries.open_registry(f"oci://{images}/untagged")
    digest = registry.put(artifact(1))
    for tag in ("prod", "dev"):
        registry.tag("mlp", tag, digest)

    registry.untag("mlp", "prod")

    assert registry.tags("mlp") == {"dev": digest}
    assert [entry.tags for entry in registry.search()] == [("mlp:dev",)]
    with pytest.raises(KernelNotFoundError):
        registry.untag("mlp", "prod")
    with pytest.raises(KernelNotFoundError):
        registry.tag("mlp", "prod", DIGEST_2)


@pytest.mark.slow
def test_damaged_bytes_are_found(images, tmp_path_factory):
    """What the registry's disk has altered is refused, and counted by a look at everything."""
    registry = registries.open_registry(f"oci://{images}/damaged")
    digest = registry.put(artifact(77))
    (stored,) = tmp_path_factory.getbasetemp().glob(
        f"images0/server/data/docker/registry/v2/blobs/sha256/*/{digest}/data"
    )
    stored.write_bytes(stored.read_bytes()[::-1])

    with pytest.raises(KernelCorruptError):
        registry.fetch(digest)
    assert registry.verify().missing == (digest,)


@pytest.mark.slow
def test_a_password_opens_a_registry_that_wants_one(tmp_path):
    """Basic authentication, as small registries have it: with it everything works."""
    (tmp_path / "users").write_text(USERS)
    with real_servers.docker_registry(tmp_path / "server", users=tmp_path / "users") as address:
        registry = registries.open_registry(f"oci://{address}/kernels", token="ann:s3cret")
        digest = registry.put(artifact(1))
        assert registry.fetch(digest) == artifact(1)
        for token in (None, "ann:wrong"):
            other = registries.open_registry(f"oci://{address}/kernels", token=token)
            with pytest.raises(KernelSourceRefused):
                other.fetch(digest)
