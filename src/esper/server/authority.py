"""Who asks, and whether they may: bearer tokens with scopes. What names no scope is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from starlette.exceptions import HTTPException

from esper.registry.book_access import Token

if TYPE_CHECKING:
    from esper.registry.stored import StoredRegistry

_BEARER = HTTPBearer(auto_error=False, description="A token of `esper registry token create`.")


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


def token_of(
    request: Request,
    needed: SecurityScopes,
    given: Credentials,
) -> Token:
    """Return the token that a request comes with.

    Raises:
        HTTPException: There is none that counts (401), or it has not the scope (403).
    """
    registry: StoredRegistry = request.app.state.registry
    token = None
    if given is not None:
        with registry.reporting("look up a token"):
            token = registry.book.tokens.find(given.credentials)
    if token is None:
        sent = "none was sent" if given is None else "what was sent is not known, or was revoked"
        msg = f"a token is needed, and {sent}: set URZA_API_TOKEN, or send Authorization: Bearer"
        raise HTTPException(401, msg, {"WWW-Authenticate": "Bearer"})
    lacking = set(needed.scopes) - set(token.scopes)
    if lacking:
        msg = f"the token of {token.name} has not the scope {', '.join(sorted(lacking))}"
        raise HTTPException(403, msg)
    return token


Reader = Annotated[Token, Security(token_of, scopes=["read"])]
Publisher = Annotated[Token, Security(token_of, scopes=["publish"])]
Promoter = Annotated[Token, Security(token_of, scopes=["promote"])]
Worker = Annotated[Token, Security(token_of, scopes=["work"])]
Admin = Annotated[Token, Security(token_of, scopes=["admin"])]
