"""The commands for real sites, as the command line reads them; Flower is loaded by those that need it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rich.console import Console

from idiolect.core.errors import UsageError
from idiolect.flower import need_flower


class Verb(Protocol):
    """Makes the parser of a command."""

    def __call__(
        self, name: str, act: Callable[[argparse.Namespace], int | None], about: str, usage: str
    ) -> argparse.ArgumentParser:
        """Return a parser whose arguments are to be added."""
        ...


def _keys(verb: Verb) -> None:
    def act(given: argparse.Namespace) -> None:
        need_flower()
        from idiolect.flower.server.keys import fingerprint, make_server, make_site
        from idiolect.flower.server.launch import private

        if not given.host and not given.site:
            raise UsageError("say --host NAME for a server, or --site NAME for a site")
        made = make_server(given.folder, given.host) if given.host else []
        for name in given.site:
            made += make_site(given.folder, name)
        if given.host:
            made.append(private(given.folder / "sites"))
        for path in made:
            print(f"{path}  {fingerprint(path.read_text())}" if path.suffix == ".pub" else path)

    about = "Make certificates and keys: an authority and a server's certificate, or a site's key."
    parser = verb("keys", act, about, "FOLDER [--host NAME ...] [--site NAME ...]")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where they go; nothing is overwritten")
    parser.add_argument("--host", nargs="+", default=[], metavar="NAME", help="names and addresses of the server")
    parser.add_argument(
        "--site", nargs="+", default=[], metavar="NAME", help="NAME.key for a site to keep, and NAME.pub"
    )


def _serve(verb: Verb) -> None:
    def act(given: argparse.Namespace) -> None:
        need_flower()
        from idiolect.flower.server.serve import serve

        serve(given.folder, given.host, given.port, given.insecure)

    parser = verb("serve", act, "Run the server that sites join.", "FOLDER [--host ADDRESS] [--port N] [--insecure]")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="certificates, sites/NAME.pub, runs; kept private")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    parser.add_argument("--insecure", action="store_true", help="no encryption, no keys: whoever comes may join")


def _join(verb: Verb) -> None:
    def act(given: argparse.Namespace) -> None:
        need_flower()
        from idiolect.flower.site.join import join

        folder = given.folder or Path(given.name)
        join(given.file, given.name, given.server, folder, given.insecure, given.restored)

    usage = "FILE.py --as NAME --server HOST:PORT [--folder FOLDER] [--restored] [--insecure]"
    parser = verb("join", act, "Take part as a site.", usage)
    parser.add_argument("file", metavar="FILE.py", help="makes app = idiolect.flower.client_app(...)")
    parser.add_argument("--as", dest="name", required=True, metavar="NAME", help="the client; its name for good")
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="where the coordinator serves")
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="ca.crt, NAME.key and what is personal (default: NAME)"
    )
    parser.add_argument(
        "--restored", action="store_true", help="after a backup was put back: go on from the newest state there is"
    )
    parser.add_argument("--insecure", action="store_true", help="no encryption and no key")


def _submit(verb: Verb) -> None:
    def act(given: argparse.Namespace) -> int:
        need_flower()
        from idiolect.flower.coordinator.submit import submit

        return submit(given.file, given.folder)

    parser = verb("submit", act, "Start a run on the server of this machine, or go on with it.", "FILE.py FOLDER")
    parser.add_argument("file", metavar="FILE.py", help="makes app = idiolect.flower.server_app(...)")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the server")


def _status(verb: Verb) -> None:
    def act(given: argparse.Namespace) -> None:
        from idiolect.flower.coordinator.status import status

        status(Console(), given.folder)

    parser = verb("status", act, "Say how a running federation stands.", "FOLDER")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the server, or of a run")


ALL = (_keys, _serve, _join, _submit, _status)
"""Each adds a command."""
