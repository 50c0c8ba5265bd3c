"""What every request passes before it is looked at: its key, and how large it is."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import Keys

OPEN = ("/health", "/page")  # without a key; so is "/": the page has no data of its own
CLOSED = "Authorization: got no valid key, expected one as 'Bearer KEY'"


def problem(status: int, message: str, param: str | None = None, **headers: str) -> JSONResponse:
    """An answer that says what is wrong, as OpenAI's do."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": status}}, status, headers or None
    )


class Authorised:
    """Lets in who has a key, and says who it is: `owner` in the request's state."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        owner = self._keys.owner(Headers(scope=scope).get("authorization"))
        path = scope["path"]
        if owner is None and path != "/" and not any(path == each or path.startswith(f"{each}/") for each in OPEN):
            await problem(401, CLOSED, **{"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than `most` bytes, at the latest when so many have come."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "0")
        if not told.isdecimal() or int(told[:20]) > self._most:
            await self._refused(scope, receive, send)
            return
        came, answered = 0, False

        async def limited() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self._most:
                raise _TooLarge
            return message

        async def sending(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, limited, sending)
        except _TooLarge:
            if not answered:
                await self._refused(scope, receive, send)

    async def _refused(self, scope: Scope, receive: Receive, send: Send) -> None:
        await problem(413, f"body: got more than {self._most} bytes, expected at most so many")(scope, receive, send)


class _TooLarge(Exception):
    pass
