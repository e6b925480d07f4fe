"""What nobody trusted has signed is refused, and no byte of it is read."""

import pickle

import pytest
from kernel_artifacts import artifact

pytest.importorskip("cryptography", reason="needs the extra sign")

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import esper
from esper.contracts import artifact_format
from esper.contracts.errors import KernelCorruptError, KernelRefusedError
from esper.contracts.signature import KernelSignature
from esper.fetching.kernel_cache import KernelCache
from esper.registry import signing
from esper.registry.memory import MemoryRegistry
from esper.registry.trusted_source import TrustedSource

DATA, OTHER = artifact(1), artifact(2)
DIGEST, OTHER_ID = map(artifact_format.digest_of, (DATA, OTHER))


def pem_of(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def key_of(number):
    """Return the signing key of a fixed random seed."""
    return signing.SigningKey(
        pem_of(ed25519.Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))
    )


OURS, THEIRS = key_of(1), key_of(2)


class Watched:
    """A source that says what was asked of it."""

    def __init__(self, registry):
        self._registry, self.asked = registry, []

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self._registry, name)


class Spy:
    """A function that says how often it was called."""

    def __init__(self, function):
        self._function, self.num_calls = function, 0

    def __call__(self, *args):
        self.num_calls += 1
        return self._function(*args)


def changed(signature, **fields):
    return KernelSignature.from_document({**signature.to_document(), **fields})


OVER_ANOTHER = OURS.sign(OTHER_ID, now_s=5)
REFUSED = {
    "unsigned": [],
    "of another key": [THEIRS.sign(DIGEST, now_s=5)],
    "over another digest": [changed(OVER_ANOTHER, artifact_id=DIGEST)],
    "at another time": [changed(OURS.sign(DIGEST, now_s=5), signed_at_s=6)],
    "in another's name": [changed(THEIRS.sign(DIGEST, now_s=5), key_id=OURS.key_id)],
}


@pytest.fixture
def registry():
    made = MemoryRegistry()
    for data in (DATA, OTHER):
        made.put(data)
    return made


def read_unsigned(registry, monkeypatch, source_of):
    """Load in each of the cases; return those in which anything of the kernel was read."""
    read = []
    for name, signatures in REFUSED.items():
        watched, parsed = Watched(registry), Spy(artifact_format.parse)
        watched.signatures = lambda digest, signatures=signatures: signatures
        with monkeypatch.context() as patched:
            patched.setattr(artifact_format, "parse", parsed)
            with pytest.raises((KernelRefusedError, KernelCorruptError)) as raised:
                KernelCache(source=source_of(watched)).load_kernel_sync(DIGEST)
        refused = raised.type is KernelRefusedError and raised.value.check == "signature"
        if not refused or parsed.num_calls or {"fetch", "get", "read"} & set(watched.asked):
            read.append(name)
    return read


def trusting(watched):
    return TrustedSource(watched, signing.TrustedKeys(OURS.public_text))


def test_what_is_not_signed_by_a_trusted_key_is_refused_unread(registry, monkeypatch):
    """Unsigned, by another key, over another digest or time: no byte is fetched or parsed."""
    assert read_unsigned(registry, monkeypatch, trusting) == []


class Late:
    """A source that looks at signatures when it has read all."""

    def __init__(self, registry):
        self._registry, self._keys = registry, signing.TrustedKeys(OURS.public_text)

    def fetch(self, digest):
        data = self._registry.fetch(digest)
        artifact_format.parse(data)
        self._keys.check(digest, self._registry.signatures(digest))
        return data


def test_control_checking_after_parsing_is_caught(registry, monkeypatch):
    """A source that refuses the same kernels, and parses them first, is found in every case."""
    assert read_unsigned(registry, monkeypatch, Late) == list(REFUSED)


def test_control_trust_that_is_not_asked_lets_everything_in(registry, monkeypatch):
    """Without the check, what is refused is fetched: the refusals are the check's own."""
    monkeypatch.setattr(signing.TrustedKeys, "check", lambda self, digest, signatures: None)
    assert read_unsigned(registry, monkeypatch, trusting) == list(REFUSED)


def test_what_a_trusted_key_has_signed_is_read(registry):
    """One signature that counts among others is enough; all of it and parts of it are given."""
    registry.attach_signature(THEIRS.sign(DIGEST, now_s=5))
    registry.attach_signature(OURS.sign(DIGEST, now_s=5))
    source = trusting(registry)

    assert source.fetch(DIGEST) == source.get(DIGEST) == DATA
    assert source.read(DIGEST, 0, 4) == DATA[:4]
    assert pickle.loads(pickle.dumps(source)).fetch(DIGEST) == DATA
    with pytest.raises(KernelRefusedError):
        source.read(OTHER_ID, 0, 4)


def test_a_registry_is_opened_with_the_keys_that_count(tmp_path):
    """What is opened so gives what is signed, refuses the rest, and does all else as ever."""
    registry = esper.open_registry(tmp_path, trusted_keys=OURS.public_text)
    digest = registry.put(DATA)
    registry.tag("mlp", "latest", digest)
    with pytest.raises(KernelRefusedError, match="signed by nobody"):
        registry.get(registry.resolve("mlp:latest"))
    registry.attach_signature(OURS.sign(digest, now_s=5))

    assert registry.get(digest) == DATA
    registry.close()
    with pytest.raises(ValueError, match="trusted key"):
        esper.open_registry(tmp_path, trusted_keys="")


def test_a_payload_that_was_changed_is_refused(registry, monkeypatch):
    """A signature is of a digest: other bytes under it are none that were signed."""
    registry.attach_signature(OURS.sign(DIGEST, now_s=5))
    monkeypatch.setattr(MemoryRegistry, "fetch", lambda self, digest: DATA[:-1] + b"x")

    with pytest.raises(KernelCorruptError, match="which is signed"):
        trusting(registry).fetch(DIGEST)


def test_control_a_changed_payload_that_is_believed(registry, monkeypatch):
    """Where the bytes are not compared, the same change goes through."""
    registry.attach_signature(OURS.sign(DIGEST, now_s=5))
    monkeypatch.setattr(MemoryRegistry, "fetch", lambda self, digest: DATA[:-1] + b"x")
    monkeypatch.setattr(artifact_format, "digest_of", lambda data: DIGEST)

    assert trusting(registry).fetch(DIGEST) != DATA


def test_the_statement_has_one_spelling():
    """What is signed is written down: who signs with another tool signs the same bytes."""
    signed = OURS.sign(DIGEST, now_s=5)
    assert (
        signed.statement()
        == (
            f'{{"artifact_id":"{DIGEST}","format":"esper-kernel-signature-1",'
            f'"key_id":"{OURS.key_id}","signed_at_s":5}}'
        ).encode()
    )


def test_trusted_keys_are_read_from_words_and_pem():
    """Between commas, on lines with remarks, and as blocks; each key once."""
    public = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([2]) * 32).public_key()
    block = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    both = tuple(sorted((OURS.key_id, THEIRS.key_id)))

    assert signing.TrustedKeys(f"{OURS.public_text},{THEIRS.public_text}").key_ids == both
    assert signing.TrustedKeys(f"{OURS.public_text}  # ann\n\n# ben\n{block}").key_ids == both
    for wrong in ("", "# nobody", "ed25519:AAAA", OURS.public_text.removeprefix("ed25519:")):
        with pytest.raises(ValueError, match="trusted key"):
            signing.TrustedKeys(wrong)


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        pem_of(ec.generate_private_key(ec.SECP256R1())),
        pem_of(
            ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)), BestAvailableEncryption(b"x")
        ),
    ],
    ids=["empty", "of another kind", "with a password"],
)
def test_what_is_no_signing_key_is_refused_with_the_cure(pem):
    """The message says which command makes one, and nothing of what was in the file."""
    with pytest.raises(ValueError, match="openssl genpkey -algorithm ed25519"):
        signing.SigningKey(pem)
