"""The commands for real sites. Flower and PyTorch are imported by the functions that need them."""

from __future__ import annotations

import argparse
from pathlib import Path

from idiolect.cli.parser import Command, Parser
from idiolect.core.errors import UsageError


def _need_flower() -> None:
    from idiolect.flower import need_flower

    need_flower()


def _add_keys(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for the files; nothing is overwritten")
    parser.add_argument("--host", nargs="+", default=[], metavar="NAME", help="host names and addresses of the server")
    parser.add_argument(
        "--site", nargs="+", default=[], metavar="NAME", help="site names; creates NAME.key and NAME.pub"
    )


def _keys(given: argparse.Namespace) -> None:
    _need_flower()
    from idiolect.flower.server.keys import fingerprint, make_server, make_site
    from idiolect.flower.system.files import private_folder

    if not given.host and not given.site:
        raise UsageError("use --host NAME for a server, or --site NAME for a site")
    made = make_server(given.folder, given.host) if given.host else []
    for name in given.site:
        made += make_site(given.folder, name)
    if given.host:
        made.append(private_folder(given.folder / "sites"))
    for path in made:
        print(f"{path}  {fingerprint(path.read_text())}" if path.suffix == ".pub" else path)


def _add_serve(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="certificates, sites/NAME.pub and runs")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (default: 8000)")
    parser.add_argument("--insecure", action="store_true", help="no encryption and no keys: anyone may join")


def _serve(given: argparse.Namespace) -> None:
    _need_flower()
    from idiolect.flower.server.serve import serve

    serve(given.folder, given.host, given.port, given.insecure)


def _add_join(parser: Parser) -> None:
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


def _join(given: argparse.Namespace) -> None:
    _need_flower()
    from idiolect.flower.site.join import join

    folder = given.folder or Path(given.name)
    join(given.file, given.name, given.server, folder, given.insecure, given.restored)


def _add_submit(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE.py", help="creates app = idiolect.flower.server_app(...)")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the server")


def _submit(given: argparse.Namespace) -> int:
    _need_flower()
    from idiolect.flower.server.submit import submit

    return submit(given.file, given.folder)


def _add_status(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the server, or of a run")


def _status(given: argparse.Namespace) -> None:
    from rich.console import Console

    from idiolect.flower.coordinator.status import status

    status(Console(), given.folder)


_JOIN = "FILE.py --as NAME --server HOST:PORT [--folder FOLDER]\n                     [--restored] [--insecure]"
COMMANDS = (
    Command(
        "keys",
        "Create certificates and keys.",
        "FOLDER [--host NAME ...] [--site NAME ...]",
        _add_keys,
        _keys,
    ),
    Command(
        "serve",
        "Run the server that sites join.",
        "FOLDER [--host ADDRESS] [--port N] [--insecure]",
        _add_serve,
        _serve,
    ),
    Command("join", "Join a run as a site.", _JOIN, _add_join, _join),
    Command("submit", "Start or resume a run on the server of this machine.", "FILE.py FOLDER", _add_submit, _submit),
    Command("status", "Print the status of a run.", "FOLDER", _add_status, _status),
)
"""Each command, in the order in which they are used."""
