"""The routes of names: where tags point, who moved them, and the way back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from esper.registry.rollback import roll_back
from esper.server import answers, models
from esper.server.authority import Promoter, Reader
from esper.server.kernels import MOST_ON_A_PAGE, registry_of

router = APIRouter(prefix="/names", tags=["names"], responses=answers.REFUSALS)

_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Name = Annotated[str, Path(pattern=_PATTERN)]
Tag = Annotated[str, Path(pattern=_PATTERN)]


@router.get("")
def names(
    request: Request,
    _: Reader,
    limit: Annotated[int, Query(ge=1, le=MOST_ON_A_PAGE)] = 100,
    after: Annotated[str, Query(max_length=64, description="As the page before says.")] = "",
) -> models.Names:
    """Return the names that have a tag, sorted, page by page."""
    found = registry_of(request).names(limit=limit, after=after)
    return models.Names(names=found, after=found[-1] if len(found) == limit else None)


@router.get("/{name}/tags")
def tags(request: Request, name: Name, _: Reader) -> models.Tags:
    """Return where each tag of a name points."""
    return models.Tags(tags=registry_of(request).tags(name))


@router.get("/{name}/tags/{tag}", responses={304: {"description": "Where it was"}})
def resolve(request: Request, response: Response, name: Name, tag: Tag, _: Reader) -> models.TagOut:
    """Return where a tag points, and as its ETag what a mover says in ``If-Match``."""
    digest = registry_of(request).resolve(f"{name}:{tag}")
    response.headers["ETag"] = answers.etag(digest)
    response.headers["Cache-Control"] = "private, no-cache"
    if answers.is_known(request.headers, answers.etag(digest)):
        response.status_code = 304
    return models.TagOut(digest=digest)


@router.put("/{name}/tags/{tag}", responses=answers.refusals(412))
def move(
    request: Request, response: Response, name: Name, tag: Tag, token: Promoter, to: models.TagIn
) -> models.TagOut:
    """Point a tag to an artifact; with ``If-Match`` only from where the mover has seen it."""
    expected = answers.expected_by(request.headers)
    registry_of(request).tag(name, tag, to.digest, expected=expected, actor=token.name)
    response.headers["ETag"] = answers.etag(to.digest)
    return models.TagOut(digest=to.digest)


@router.delete("/{name}/tags/{tag}", status_code=204, responses=answers.refusals(412))
def remove(request: Request, name: Name, tag: Tag, token: Promoter) -> None:
    """Take a tag away. Its history stays."""
    expected = answers.expected_by(request.headers)
    registry_of(request).untag(name, tag, expected=expected, actor=token.name)


@router.get("/{name}/tags/{tag}/history")
def history(request: Request, name: Name, tag: Tag, _: Reader) -> models.History:
    """Return every move of a tag, oldest first."""
    moves = registry_of(request).history(name, tag)
    return models.History(
        moves=[
            models.Move(digest=move.digest, moved_at_s=move.moved_at_s, actor=move.actor)
            for move in moves
        ]
    )


@router.post("/{name}/tags/{tag}/rollback", responses=answers.refusals(412))
def rollback(
    request: Request, response: Response, name: Name, tag: Tag, token: Promoter
) -> models.TagOut:
    """Point a tag to where it pointed before its last move."""
    earlier = roll_back(registry_of(request), name, tag, actor=token.name)
    response.headers["ETag"] = answers.etag(earlier)
    return models.TagOut(digest=earlier)
