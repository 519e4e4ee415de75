"""Looks at every request before anything else does: where it comes from, its token, its size."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from mm_jax.serve.counters import Counters
from mm_jax.serve.errors import ApiError

OPEN_PATHS = ("/", "/healthz")  # what needs no token: the page asks for it
# A body must come at this rate, after a grace; over a network it may pause for longer.
LEAST_RATE = 10_000  # bytes a second
WITH_BODY = ("POST", "PUT", "PATCH")
BODIES = 16  # of the largest, that are held at a time
GRACE_LOCAL, GRACE = 0.8, 10.0  # seconds

Scope = dict
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclasses.dataclass
class Guard:
    """Wraps an ASGI application.

    token: what a request must bear, "" for none; local: whether the server listens to this machine
    alone, and must be called by its name (else a page elsewhere could reach it through a name that
    it makes point here); most: bytes of a body; held: of all bodies now, at most `BODIES` times
    that.
    """

    app: Callable
    counters: Counters
    token: str
    local: bool
    most: int
    held: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        status = 0
        own = Held(self)

        async def told(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
            await send(message)

        try:
            self._check(scope)
            body = b""
            if scope["method"] in WITH_BODY:
                body = await self._body(scope, receive, own)
            receive = replayed(body, receive)
            del body
            await self.app(scope, receive, told)
        except ApiError as error:
            if error.status != 408:
                await drained(receive)
            await answer(told, error)
        finally:
            own.give_back()
            # Paths hold ids of conversations: the route's pattern is counted instead.
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.counters.requests.labels(path, str(status)).inc()

    def _check(self, scope: Scope) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            site = host if origin is None else urlsplit(origin).netloc
        except ValueError as error:
            raise ApiError(400, "Host or Origin is no address") from error
        if self.local and not is_loopback(name):
            raise ApiError(403, "this server is called by another name than this machine's")
        if site != host:
            raise ApiError(403, "requests from other sites' pages are refused")
        if self.token and scope["path"] not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            known = secrets.compare_digest(given.strip().encode(), self.token.encode())
            if kind.lower() != "bearer" or not known:
                raise ApiError(
                    401, "no or wrong token", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        if scope["method"] not in WITH_BODY:
            return
        size = headers.get("content-length")
        if size is not None and (not size.isdigit() or int(size[:20]) > self.most):
            raise ApiError(413, f"the body has more than {self.most} bytes", code="too_large")
        if size == "0":
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page elsewhere can send other kinds without asking.
        if kind != "application/json":
            raise ApiError(415, "expected Content-Type: application/json")

    async def _body(self, scope: Scope, receive: Receive, own: Held) -> bytes:
        """Reads the whole body. Raises ApiError where it is too large or comes too slowly."""
        parts, size, began = [], 0, time.monotonic()
        grace = GRACE_LOCAL if is_loopback((scope.get("client") or ("",))[0]) else GRACE
        while True:
            due = began + grace + size / LEAST_RATE
            try:
                message = await asyncio.wait_for(receive(), max(0.05, due - time.monotonic()))
            except TimeoutError as error:
                raise ApiError(
                    408, "the body came too slowly", headers={"Connection": "close"}
                ) from error
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client went away")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            own.take(len(parts[-1]))
            if size > self.most:
                raise ApiError(413, f"the body has more than {self.most} bytes", code="too_large")
            if not message.get("more_body"):
                return b"".join(parts)


@dataclasses.dataclass
class Held:
    """Counts the bytes of a request's body among those that a guard holds."""

    guard: Guard
    size: int = 0

    def take(self, count: int) -> None:
        if self.guard.held + count > BODIES * self.guard.most:
            raise ApiError(429, "too many clips at a time", headers={"Retry-After": "2"})
        self.guard.held += count
        self.size += count

    def give_back(self) -> None:
        self.guard.held -= self.size


# The page is one file and asks for nothing elsewhere.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:; media-src blob: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy must not hold a stream back
]


def replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read to the application, and then what comes after it."""
    kept = [body]
    del body

    async def again() -> dict:
        if not kept:
            return await receive()
        return {"type": "http.request", "body": kept.pop(), "more_body": False}

    return again


async def drained(receive: Receive) -> None:
    """Reads the rest of a refused body, for half a second: else a client that is still sending
    would see a broken connection, not the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            while (await receive()).get("more_body"):
                pass


async def answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
