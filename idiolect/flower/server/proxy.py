"""The server's door: what sites need passes, and nothing else.

Flower serves sites, operators and its own processes on one port, and asks operators for no password: whoever can reach
that port can have code run on the server and on all sites. So Flower listens on this machine alone, and the world
reaches this door, which passes the requests of sites.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from idiolect.core.errors import UsageError

SITES = "/v1/fleet/"
"""Where Flower's requests for sites are, one plain word each."""

LARGEST = 64 * 2**20
"""Bytes of the largest request that passes; tensors travel in pieces of 5 MB."""

_HOP = {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "upgrade"}


def start_proxy(host: str, port: int, behind: int, certificates: tuple[Path, Path, Path] | None) -> None:
    """Listen for sites in a thread of its own, and pass their requests to Flower on this machine.

    Args:
        host: address to listen on.
        port: port to listen on.
        behind: port of Flower on the loopback.
        certificates: authority, certificate and key; None for no encryption.

    Raises:
        UsageError: if nobody can listen there.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    authority, certificate, key = certificates or (None, None, None)
    client = httpx.AsyncClient(
        base_url=f"{'https' if authority else 'http'}://127.0.0.1:{behind}",
        verify=ssl.create_default_context(cafile=str(authority)) if authority else False,
        timeout=300.0,
    )

    async def body(request: Request) -> AsyncIterator[bytes]:
        passed = 0
        async for piece in request.stream():
            passed += len(piece)
            if passed > LARGEST:
                raise ValueError("a request is larger than what passes")
            yield piece

    async def forward(request: Request) -> Response:
        if int(request.headers.get("content-length", 0)) > LARGEST:
            return PlainTextResponse(f"no request of more than {LARGEST} bytes passes", 413)
        word = request.path_params["word"]
        if not re.fullmatch(r"[a-z][a-z-]*", word):  # no dots, no slashes: nothing that leads elsewhere
            return PlainTextResponse("no such request", 404)
        asked = client.build_request("POST", SITES + word, headers=_kept(request.headers), content=body(request))
        try:
            told = await client.send(asked, stream=True)
        except (httpx.HTTPError, ValueError) as error:
            return PlainTextResponse(f"no answer from Flower: {error}", 502)
        return StreamingResponse(told.aiter_raw(), told.status_code, _kept(told.headers))

    app = Starlette(routes=[Route(SITES + "{word}", forward, methods=["POST"])])
    config = uvicorn.Config(
        app, ws="none", log_level="error", ssl_certfile=certificate, ssl_keyfile=key, timeout_graceful_shutdown=1
    )
    threading.Thread(target=uvicorn.Server(config).run, args=([listening],), daemon=True).start()


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP}
