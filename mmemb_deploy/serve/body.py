"""Reading a request's body: JSON, within its limit and its time, whatever the client declares."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from mmemb_deploy.serve.failures import ClientGoneError, Refusal, shown_value

DISCARDED = 3  # times the limit that is read of a body that is too large, for a client that reads only after it wrote


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """Return the body.

    Raises Refusal: 415 for a media type other than JSON, 413 above `limit` bytes, 408 after `seconds`. Raises
    ClientGoneError where the client closes its connection.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"Content-Type is {shown_value(media_type)}: send JSON as application/json"
        raise Refusal(415, "unsupported_media_type", message)
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    content += chunk
                elif size > (1 + DISCARDED) * limit:
                    break
    except TimeoutError as error:
        message = f"the body did not arrive within {seconds:g} s"
        raise Refusal(408, "request_timeout", message, headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    if size > limit:
        message = f"the body has more than the {limit} bytes that are accepted: ask for fewer inputs, or smaller images"
        raise Refusal(413, "body_too_large", message, headers={"Connection": "close"})
    return bytes(content)
