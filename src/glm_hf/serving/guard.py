"""What stands before all paths: the key, the size of bodies, and the counts of answers."""

import hmac
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message

from glm_hf.serving.metrics import Metrics
from glm_hf.serving.protocol import APIError

OPEN_PATHS = ("/", "/health", "/page.css", "/page.js")
"""What is shown without the key."""


class Guard:
    """
    An ASGI application around another.

    Args:
        app: The application inside.
        metrics: Where answers are counted.
        api_key: Key that requests must bring, None for none.
        most_bytes: Size of the largest body that is read.
    """

    def __init__(self, app: Any, metrics: Metrics, api_key: str | None, most_bytes: int) -> None:
        self.app, self.metrics, self.most_bytes = app, metrics, most_bytes
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.most_bytes:
                raise TooLarge
            return message

        async def send_counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if (error := self.refusal(scope)) is not None:
                await error_response(error)(scope, receive, send_counted)
            else:
                await self.app(scope, receive_limited, send_counted)
        except TooLarge:
            await error_response(self._too_large())(scope, receive, send_counted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()

    def refusal(self, scope: dict[str, Any]) -> APIError | None:
        """Return why a request is not looked at, None if it is."""
        headers = dict(scope["headers"])
        if self.api_key is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.api_key):
                return APIError("the API key is missing or wrong", 401, code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.most_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> APIError:
        return APIError(f"the body must have at most {self.most_bytes:,} bytes", 413, code="request_too_large")


class TooLarge(BaseException):
    """A body that is larger than it may be; no `except Exception` on its way is to take it for its own."""


def error_response(error: APIError) -> Response:
    """Return an error in OpenAI's form."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)
