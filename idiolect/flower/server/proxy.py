"""A reverse proxy in front of Flower that forwards the requests of sites and nothing else.

Flower serves sites, operators and its own processes on one port, and does not authenticate operators: anyone who
reaches that port can run code on the server and on all sites. So Flower listens on the loopback interface only, and
sites connect to this proxy.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from idiolect.core.errors import UsageError

SITE_REQUESTS = "/v1/fleet/"
"""Path of Flower's requests for sites; a request name follows."""

MAX_REQUEST = 64 * 2**20
"""Bytes of the largest request that is forwarded; Flower sends tensors in pieces of 5 MB."""

_NOT_FORWARDED = {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "upgrade"}
"""Headers that belong to one connection."""


def start_proxy(host: str, port: int, flower_port: int, certificates: tuple[Path, Path, Path] | None) -> None:
    """Start the proxy in a thread of its own.

    Args:
        host: address to listen on.
        port: port to listen on.
        flower_port: port of Flower on the loopback interface.
        certificates: authority, certificate and key; None for no encryption.

    Raises:
        UsageError: if the address cannot be used.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    authority, certificate, key = certificates or (None, None, None)
    client = httpx.AsyncClient(
        base_url=f"{'https' if authority else 'http'}://127.0.0.1:{flower_port}",
        verify=ssl.create_default_context(cafile=str(authority)) if authority else False,
        timeout=300.0,
    )
    app = Starlette(routes=[Route(SITE_REQUESTS + "{name}", _forwarder(client), methods=["POST"])])
    config = uvicorn.Config(
        app, ws="none", log_level="error", ssl_certfile=certificate, ssl_keyfile=key, timeout_graceful_shutdown=1
    )
    threading.Thread(target=uvicorn.Server(config).run, args=([listener],), daemon=True).start()


def _forwarder(client: httpx.AsyncClient) -> Callable[[Request], Awaitable[Response]]:
    """Return the function that forwards a request to Flower."""

    async def body(request: Request) -> AsyncIterator[bytes]:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size > MAX_REQUEST:
                raise ValueError(f"the request is larger than {MAX_REQUEST} bytes")
            yield piece

    async def forward(request: Request) -> Response:
        if int(request.headers.get("content-length", 0)) > MAX_REQUEST:
            return PlainTextResponse(f"the request is larger than {MAX_REQUEST} bytes", 413)
        name = request.path_params["name"]
        if not re.fullmatch(r"[a-z][a-z-]*", name):  # no dots and no slashes, so no path outside SITE_REQUESTS
            return PlainTextResponse("unknown request", 404)
        headers = _forwarded(request.headers)
        forwarded = client.build_request("POST", SITE_REQUESTS + name, headers=headers, content=body(request))
        try:
            response = await client.send(forwarded, stream=True)
        except (httpx.HTTPError, ValueError) as error:
            return PlainTextResponse(f"no response from Flower: {error}", 502)
        return StreamingResponse(response.aiter_raw(), response.status_code, _forwarded(response.headers))

    return forward


def _forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _NOT_FORWARDED}
