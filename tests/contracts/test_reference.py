"""How kernels are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.reference import check_digest, check_name, is_digest, split_reference


def test_a_digest_is_64_lower_case_hexadecimal_digits():
    """One spelling, and nothing before or after it."""
    digest = "0123456789abcdef" * 4
    assert check_digest(digest) == digest
    for wrong in (digest[1:], digest + "0", digest.upper(), digest + "\n", " " + digest, ""):
        assert not is_digest(wrong)
        with pytest.raises(ValueError, match="is not a digest"):
            check_digest(wrong)


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True))
def test_every_name_of_the_alphabet_is_a_name(name):
    """Names are taken as they are, alone and in a reference."""
    assert check_name(name) == name
    assert split_reference(f"{name}:{name}") == (name, name)


@given(st.text(max_size=70))
def test_a_name_can_never_leave_its_directory(text):
    """Whatever is taken for a name has no separator, no colon and no dot in front."""
    try:
        check_name(text)
    except ValueError:
        return
    assert not set(text) & set("/\\:\0\n")
    assert not text.startswith(".")


@pytest.mark.parametrize("reference", ["mlp", "", ":", "mlp:", ":latest", "a:b:c", "mlp: latest"])
def test_a_reference_is_one_name_one_colon_one_tag(reference):
    """Anything else is refused with an example of what is meant."""
    with pytest.raises(ValueError, match="expected"):
        split_reference(reference)


def test_a_message_stays_short():
    """A megabyte that came for a name does not go into the log."""
    with pytest.raises(ValueError, match="cannot be a tag") as caught:
        check_name("A" * 1_000_000, what="tag")
    assert len(str(caught.value)) < 300
