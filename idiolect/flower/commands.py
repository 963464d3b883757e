"""The commands for real sites; Flower is imported only by those that need it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rich.console import Console

from idiolect.core.errors import UsageError
from idiolect.flower import need_flower


class AddCommand(Protocol):
    """Add a command to the command line."""

    def __call__(
        self, name: str, act: Callable[[argparse.Namespace], int | None], about: str, usage: str
    ) -> argparse.ArgumentParser:
        """Return the parser of the new command."""
        ...


def _keys(add_command: AddCommand) -> None:
    def act(given: argparse.Namespace) -> None:
        need_flower()
        from idiolect.flower.server.keys import fingerprint, make_server, make_site
        from idiolect.flower.system.files import private_folder

        if not given.host and not given.site:
            raise UsageError("use --host NAME for a server, or --site NAME for a site")
        created = make_server(given.folder, given.host) if given.host else []
        for name in given.site:
            created += make_site(given.folder, name)
        if given.host:
            created.append(private_folder(given.folder / "sites"))
        for path in created:
            print(f"{path}  {fingerprint(path.read_text())}" if path.suffix == ".pub" else path)

    about = "Create certificates for a server, or a key for a site."
    parser = add_command("keys", act, about, "FOLDER [--host NAME ...] [--site NAME ...]")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for the files; nothing is overwritten")
    parser.add_argument("--host", nargs="+", default=[], metavar="NAME", help="host names and addresses of the server")
    parser.add_argument(
        "--site", nargs="+", default=[], metavar="NAME", help="site names; creates NAME.key and NAME.pub"
    )


def _serve(add_command: AddCommand) -> None:
    def act(given: argparse.Namespace) -> None:
        need_flower()
        from idiolect.flower.server.serve import serve

        serve(given.folder, given.host, given.port, given.insecure)

    parser = add_command(
        "serve", act, "Run the server that sites join.", "FOLDER [--host ADDRESS] [--port N] [--insecure]"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="certificates, sites/NAME.pub and runs")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (default: 8000)")
    parser.add_argument("--insecure", action="store_true", help="no encryption and no keys: anyone may join")


def _join(add_command: AddCommand) -> None:
    def act(given: argparse.Namespace) -> None:
        need_flower()
        from idiolect.flower.site.join import join

        folder = given.folder or Path(given.name)
        join(given.file, given.name, given.server, folder, given.insecure, given.restored)

    usage = "FILE.py --as NAME --server HOST:PORT [--folder FOLDER] [--restored] [--insecure]"
    parser = add_command("join", act, "Join a run as a site.", usage)
    parser.add_argument("file", metavar="FILE.py", help="creates app = idiolect.flower.client_app(...)")
    parser.add_argument("--as", dest="name", required=True, metavar="NAME", help="client name; must stay the same")
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="address of the server")
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="ca.crt, NAME.key and personal state (default: NAME)"
    )
    parser.add_argument(
        "--restored", action="store_true", help="after restoring a backup: continue from the newest state"
    )
    parser.add_argument("--insecure", action="store_true", help="no encryption and no key")


def _submit(add_command: AddCommand) -> None:
    def act(given: argparse.Namespace) -> int:
        need_flower()
        from idiolect.flower.server.submit import submit

        return submit(given.file, given.folder)

    parser = add_command("submit", act, "Start or resume a run on the server of this machine.", "FILE.py FOLDER")
    parser.add_argument("file", metavar="FILE.py", help="creates app = idiolect.flower.server_app(...)")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the server")


def _status(add_command: AddCommand) -> None:
    def act(given: argparse.Namespace) -> None:
        from idiolect.flower.coordinator.status import status

        status(Console(), given.folder)

    parser = add_command("status", act, "Print the status of a run.", "FOLDER")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the server, or of a run")


ALL = (_keys, _serve, _join, _submit, _status)
"""Functions that each add a command."""
