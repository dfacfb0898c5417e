"""The body of a request to the server, up to a size."""

import asyncio
from contextlib import suppress

from starlette.requests import Request

from infer.openai_api import ApiError

BODY_LIMIT = 16 * 2**20  # bytes
BODY_SECONDS = 60.0  # in which a body must have come
DISCARD_LIMIT, DISCARD_SECONDS = 64 * 2**20, 10.0  # of a body that is larger


async def bounded_body(request: Request) -> bytes:
    """The body, up to BODY_LIMIT bytes.

    Raises:
        ApiError: there is more, of which nothing is kept, or it does not come in BODY_SECONDS.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _body(request)
    except TimeoutError:
        raise ApiError(408, f"the body did not come in {BODY_SECONDS:g} seconds", code="timeout") from None


async def _body(request: Request) -> bytes:
    too_large = ApiError(413, f"the body is larger than {BODY_LIMIT} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > BODY_LIMIT:
        if "expect" not in request.headers:  # with Expect: 100-continue nothing is sent yet
            await _discard(request)
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_LIMIT:
            parts.clear()
            await _discard(request)
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def _discard(request: Request) -> None:
    """Reads the rest of a body, within bounds: a client that still sends when it is cut off never sees the answer."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > DISCARD_LIMIT:
                    return
