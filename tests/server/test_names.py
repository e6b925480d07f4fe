"""Names over HTTP: a promotion that lost is told so, and who moved what is known."""

import pytest
from kernel_artifacts import artifact

pytest.importorskip("fastapi", reason="needs the extra server")

pytestmark = [pytest.mark.network, pytest.mark.slow]

TAG = "/names/mlp/tags/prod"


def test_the_loser_of_two_promotions_gets_412(ask, kept):
    """A tag moves by If-Match only from where it was seen, and rolls back to where it was."""
    digests = [kept.put(artifact(number)) for number in range(3)]
    first = ask.put(TAG, json={"digest": digests[0]}, headers={"If-None-Match": "*"})
    seen = {"If-Match": first.headers["ETag"]}
    assert ask.put(TAG, json={"digest": digests[1]}, headers=seen).status_code == 200

    lost = ask.put(TAG, json={"digest": digests[2]}, headers=seen)

    assert (lost.status_code, lost.json()["found"]) == (412, digests[1])
    assert lost.json()["type"] == "urn:esper:problem:tag-moved"
    assert ask.get(TAG).json() == {"digest": digests[1]}
    assert ask.post(f"{TAG}/rollback").json() == {"digest": digests[0]}
    moves = ask.get(f"{TAG}/history").json()["moves"]
    assert [move["digest"] for move in moves] == [digests[0], digests[1], digests[0]]
    assert {move["actor"] for move in moves} == {"ann"}
    lines = ask.get("/audit").json()["lines"]
    assert [(line["actor"], line["action"], line["detail"]) for line in lines] == [
        ("ann", "tag", digest) for digest in (digests[0], digests[1], digests[0])
    ]


@pytest.mark.parametrize(
    "headers", [{"If-Match": "*"}, {"If-None-Match": '"x"'}, {"If-Match": "W/x"}]
)
def test_a_condition_that_is_none_moves_nothing(ask, kept, headers):
    """A condition that is not understood is refused, never left out."""
    digest = kept.put(artifact(1))
    assert ask.put(TAG, json={"digest": digest}, headers=headers).status_code == 400
    assert kept.names() == []


def test_control_promotions_without_a_condition_are_lost(ask, kept):
    """Two who do not say what they saw both succeed, and one of them is undone."""
    digests = [kept.put(artifact(number)) for number in range(2)]
    assert {ask.put(TAG, json={"digest": d}).status_code for d in digests} == {200}
    assert ask.get(TAG).json() == {"digest": digests[1]}
