"""Images that a request shows by address: data URIs always, the web only from hosts that were allowed.

What is fetched cannot reach into the server's own network: the name is looked up once, every address it has must be
global, the connection goes to the address that was checked (TLS still proves the name), and a redirect is a new address
that is checked again.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from mmemb_deploy.errors import InputError
from mmemb_deploy.serve.failures import Refusal, shown_value

MAX_REDIRECTS = 3
TOGETHER = 8  # images of one request that are fetched at a time
CARRIERS = (ipaddress.ip_network("::/96"), ipaddress.ip_network("64:ff9b::/96"))  # of an IPv4 address at their end

Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True)
class Link:
    """An image that is yet to be read, by its address."""

    url: str


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What may be read."""

    image_bytes: int  # of one encoded image
    total_bytes: int  # of all that is fetched for one request
    hosts: frozenset[str]  # from which images are fetched; with ":port" unless it is the scheme's own
    seconds: float  # for one image


async def addresses_of(host: str, port: int) -> list[str]:
    """Look a name up; raises OSError where it has no address."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class MediaReader:
    """Reads the images of requests. `resolve` and `transport` are the network's, tests put their own."""

    def __init__(
        self, limits: MediaLimits, *, resolve: Resolve = addresses_of, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.limits = limits
        self._resolve = resolve
        # No proxies of the environment: one would look names up by itself.
        self._client = httpx.AsyncClient(
            transport=transport, trust_env=False, follow_redirects=False, timeout=limits.seconds
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def read(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Return the inputs with the bytes of its image in place of each Link.

        Raises InputError, with the input's index, for an address that is not accepted or does not answer; Refusal with
        413 for an image, or all that is fetched, above its limit.
        """
        if not any(isinstance(each, dict) for each in inputs):
            return inputs
        budget = _Budget(self.limits.total_bytes)
        turns = asyncio.Semaphore(TOGETHER)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._input(each, at, budget, turns)) for at, each in enumerate(inputs)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    async def _input(self, given: Any, index: int, budget: _Budget, turns: asyncio.Semaphore) -> Any:
        if not isinstance(given, dict):
            return given
        images = [await self._image(link.url, budget, turns, index) for link in given["images"]]
        return {**given, "images": images}

    async def _image(self, url: str, budget: _Budget, turns: asyncio.Semaphore, index: int) -> bytes:
        try:
            if url[:5].lower() == "data:":
                return _decoded(url, self.limits.image_bytes)
            async with turns, asyncio.timeout(self.limits.seconds):
                return await self._fetched(url, budget)
        except TimeoutError as error:
            message = f"{shown_value(url)} was not fetched within {self.limits.seconds:g} s: send a data URI"
            raise InputError(message, index=index) from error
        except httpx.HTTPError as error:
            raise InputError(f"{shown_value(url)} cannot be fetched ({type(error).__name__})", index=index) from error
        except InputError as error:
            raise error.at(index) from error

    async def _fetched(self, url: str, budget: _Budget) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            request = await self._request(url)
            answer = await self._client.send(request, stream=True)
            try:
                if answer.has_redirect_location:
                    url = str(_url(answer.headers["location"], httpx.URL(url)))
                    continue
                if answer.status_code != 200:
                    raise InputError(f"{shown_value(url)} answers with status {answer.status_code}, not 200")
                content = bytearray()
                async for chunk in answer.aiter_raw():  # decompressing could fill the memory
                    content += chunk
                    budget.take(len(chunk))
                    if len(content) > self.limits.image_bytes:
                        raise _too_large(self.limits.image_bytes)
                return bytes(content)
            finally:
                await answer.aclose()
        raise InputError(f"the address redirects more than {MAX_REDIRECTS} times: give the last of them")

    async def _request(self, url: str) -> httpx.Request:
        """Return a request to one checked address of the host, which is still asked for by its name."""
        where = self._allowed(url)
        host = where.raw_host.decode("ascii")
        try:
            found = await self._resolve(host, where.port or {"http": 80, "https": 443}[where.scheme])
        except OSError as error:
            raise InputError(f"the host {shown_value(host)} has no address") from error
        for address in found:
            if not _is_global(address):
                raise InputError(f"the host {shown_value(host)} has an address that is not global: it is never fetched")
        headers = {"Host": where.netloc.decode("ascii"), "Accept-Encoding": "identity"}
        return self._client.build_request(
            "GET", where.copy_with(host=found[0]), headers=headers, extensions={"sni_hostname": host}
        )

    def _allowed(self, url: str) -> httpx.URL:
        shown = shown_value(url)
        if not self.limits.hosts:
            raise InputError(f"{shown} is no data URI, and this server fetches nothing: send data:image/...;base64,...")
        where = _url(url)
        if where.scheme not in ("http", "https"):
            raise InputError(f"{shown} has the scheme {shown_value(where.scheme)}: send a data URI, http or https")
        if where.userinfo:
            raise InputError("an address with a user or a password in it is not fetched: leave them out")
        if (place := where.netloc.decode("ascii")) not in self.limits.hosts:
            raise InputError(f"images are not fetched from the host {shown_value(place)}: send a data URI")
        return where


@dataclass
class _Budget:
    left: int  # bytes

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Refusal(413, "media_too_large", "the images of this request are too large together: ask for fewer")


def _decoded(url: str, limit: int) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InputError(f"{shown_value(url)} is not a data URI of base64: send data:image/png;base64,...")
    if len(data) // 4 * 3 - data[-2:].count("=") > limit:
        raise _too_large(limit)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{shown_value(url)} is no base64 ({error}): encode the file's bytes") from error


def _url(text: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        return httpx.URL(text) if base is None else base.join(text)
    except httpx.InvalidURL as error:
        raise InputError(f"{shown_value(text)} is no address: {error}") from error


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413, "media_too_large", f"an image has more than the {limit} bytes that are accepted: make it smaller"
    )


def _is_global(address: str) -> bool:
    """Whether an address is one of the public internet; where one of IPv4 is inside it, that too."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address):
        return _plainly_global(parsed)
    if parsed.ipv4_mapped is not None:
        return _plainly_global(parsed.ipv4_mapped)
    inner = [parsed.sixtofour] if parsed.sixtofour is not None else []
    inner += [ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF) for network in CARRIERS if parsed in network]
    return _plainly_global(parsed) and all(map(_plainly_global, inner))


def _plainly_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not address.is_multicast
