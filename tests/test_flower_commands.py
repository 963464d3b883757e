"""Keys, doors, workers and the lines people get when something is missing; no Flower process is started here."""

import contextlib
import http.server
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("flwr")

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

import idiolect
import idiolect.flower
from idiolect.cli import main as cli
from idiolect.flower.load import load
from idiolect.flower.server import serve as serving
from idiolect.flower.server.keys import make_server, make_site
from idiolect.flower.server.launch import environment, free_port, last_words
from idiolect.flower.server.proxy import LARGEST, start_proxy
from idiolect.flower.site.app import Site
from idiolect.flower.site.join import _answers, _cause
from idiolect.flower.site.relay import FAILED, receive, send
from idiolect.flower.site.state import locked
from idiolect.flower.site.worker import Worker


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def refusal(capsys, *words):
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_the_authority_signs_the_server_and_its_keys_are_private(tmp_path):
    ca, ca_key, certificate, key = make_server(tmp_path / "server", ["hub.example.org", "10.0.0.7"])
    root, leaf = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (ca, certificate))
    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]
    assert [mode(path) for path in (ca_key, key)] == [0o600, 0o600]
    assert mode(tmp_path / "server") == 0o700


def test_a_key_is_never_overwritten(tmp_path, capsys):
    private, public = make_site(tmp_path, "north")
    before = private.read_bytes()
    assert mode(private) == 0o600
    key = serialization.load_ssh_private_key(before, None).public_key()
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert public.read_bytes().split() == text.split()
    assert "never overwritten" in refusal(capsys, "keys", tmp_path, "--site", "north")
    assert private.read_bytes() == before


def test_keys_want_to_know_whose(tmp_path, capsys):
    assert "--host NAME for a server, or --site NAME" in refusal(capsys, "keys", tmp_path)


def test_serving_needs_certificates_or_a_word(tmp_path, capsys):
    told = refusal(capsys, "serve", tmp_path / "server")
    assert "ca.crt is missing: make it with `idiolect keys" in told
    assert "--insecure" in told
    assert mode(tmp_path / "server") == 0o700


SITE = """
import torch
from torch import nn
import idiolect
import idiolect.flower
from beside import SIZE

def load():
    return idiolect.ClientData((torch.zeros(4, SIZE), torch.tensor([0, 1, 0, 1])))

app = idiolect.flower.client_app(model=lambda: nn.Linear(SIZE, 2), data=load)
other = 3
"""


@pytest.fixture
def site_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("SIZE = 3\n")
    (tmp_path / "ward.py").write_text(SITE)
    return tmp_path / "ward.py"


def test_joining_needs_a_site_and_its_key(site_file, tmp_path, capsys):
    words = ("--as", "north", "--server", "127.0.0.1:1", "--folder", tmp_path / "north")
    told = refusal(capsys, "join", site_file, *words)
    assert "ca.crt is missing: the coordinator has it" in told
    (tmp_path / "north" / "ca.crt").write_text("x")
    assert "north.key is missing: make it with `idiolect keys" in refusal(capsys, "join", site_file, *words)
    assert "nowhere.py is no Python file" in refusal(capsys, "join", tmp_path / "nowhere.py", *words, "--insecure")
    assert "has no other = idiolect.flower.client_app" in refusal(
        capsys, "join", f"{site_file}:other", *words, "--insecure"
    )
    named = ("--as", "../north", "--server", "127.0.0.1:1", "--folder", tmp_path / "north", "--insecure")
    assert "cannot name a folder" in refusal(capsys, "join", site_file, *named)


HUB = """
import idiolect
import idiolect.flower
from torch import nn

app = idiolect.flower.server_app(model=lambda: nn.Linear(3, 2), method=idiolect.methods.fedavg(), rounds=3)
"""


def test_submitting_needs_a_server_and_a_plain_assignment(tmp_path, capsys):
    hub, server = tmp_path / "hub.py", tmp_path / "server"
    hub.write_text(HUB.replace("app =", "app: object ="))
    assert "no server has run in" in refusal(capsys, "submit", hub, server)
    (server / "flower").mkdir(parents=True)
    (server / "flower" / "config.toml").write_text("")
    assert "has no plain `app = idiolect.flower.server_app(...)`" in refusal(capsys, "submit", hub, server)
    assert "is no Python file" in refusal(capsys, "submit", tmp_path / "nowhere.py", server)
    hub.write_text("app = 3\n")
    assert "has no app = idiolect.flower.server_app(...)" in refusal(capsys, "submit", hub, server)
    hub.write_text(HUB.replace("rounds", "roundss"))
    assert "hub.py cannot be run: TypeError: server_app() got an unexpected" in refusal(capsys, "submit", hub, server)


def test_a_site_joins_once(site_file, tmp_path, capsys):
    (tmp_path / "north").mkdir()
    held = locked(tmp_path / "north" / "north.lock")
    words = ("--as", "north", "--server", "127.0.0.1:1", "--folder", tmp_path / "north", "--insecure")
    assert f"is in use by process {os.getpid()}" in refusal(capsys, "join", site_file, *words)
    os.close(held)


def test_why_a_site_is_not_in():
    assert "ca.crt is not the authority" in _cause("x [SSL: CERTIFICATE_VERIFY_FAILED] y", "north")
    assert "no north.pub" in _cause("[code: 2004] Failed to activate SuperNode.", "north")
    assert _cause("no room", "north") == "cut off: no room"
    with socket.create_server(("127.0.0.1", 0)) as there:
        assert _answers(f"127.0.0.1:{there.getsockname()[1]}")
    assert not _answers(f"127.0.0.1:{free_port()}")
    with pytest.raises(idiolect.UsageError, match="write HOST:PORT"):
        _answers("hub")


def test_the_status_of_a_run(tmp_path, capsys):
    assert "no run has begun in" in refusal(capsys, "status", tmp_path)
    (tmp_path / "run").mkdir()
    site = {"state": "at work", "examples": 462, "last seen": time.time() - 90, "up": 2_500_000, "down": 3_000_000}
    told = {"time": time.time(), "round": 2, "rounds": 5, "phase": "1 of 2 results, 30 s left"}
    sites = {"north": {**site, "measured": {"accuracy": 0.75}}, "south": {"state": "offline", "examples": 3}}
    (tmp_path / "run" / "status.json").write_text(json.dumps({**told, "sites": sites}))
    event = {"time": "2026-11-24T10:11:12+00:00", "rounds played": 2, "client": "south", "what": "offline"}
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert cli.main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "round 2 of 5 played, 1 of 2 results, 30 s left",
        "1 min ago",
        "0.7500",
        "2.50",
        "10:11:12  south: offline",
    ):
        assert words in printed, printed


def test_what_flower_printed_last_is_told_in_a_line(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "\x1b[91mERROR\x1b[0m: Exit Code: 305\nFailed to connect.\n[code: 2004] No such key.\nINFO: Shutting down\n"
    )
    assert last_words(log) == "Failed to connect. [code: 2004] No such key."
    log.write_text("one\ntwo\n\nthree\nfour\n")
    assert last_words(log) == "two three four"


def test_nothing_calls_home(tmp_path):
    env = environment(tmp_path / "home")
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert Path(env["FLWR_HOME"]) == tmp_path / "home"
    assert mode(tmp_path / "home") == 0o700


def test_a_message_crosses_a_socket_as_it_is():
    weights = torch.randn(3, 2)
    content = RecordDict({"slot/share": ArrayRecord({"w": Array(weights.numpy()), "b": Array(torch.zeros(0).numpy())})})
    content["words"] = ConfigRecord(
        {"lr": 0.1, "round": 3, "names": ["a", "b"], "rows": [1.5, float("inf")], "yes": True}
    )
    one, other = socket.socketpair()
    with one, other:
        threading.Thread(target=send, args=(one, "train", content)).start()
        kind, found = receive(other)
    assert kind == "train"
    assert dict(found.config_records["words"]) == dict(content.config_records["words"])
    assert found.array_records["slot/share"]["w"].data == content.array_records["slot/share"]["w"].data
    assert found.array_records["slot/share"]["b"].shape == (0,)


def test_a_site_that_goes_in_the_middle_of_a_message_is_noticed():
    one, other = socket.socketpair()
    with other:
        one.sendall(b"\0\0\0\0\0\0\0\x09{")
        one.close()
        with pytest.raises(ConnectionError, match="has gone"):
            receive(other)


def asked(path, kind, content):
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        send(line, kind, content)
        return receive(line)[1]


def test_a_worker_answers_and_outlives_an_error_of_the_users_code(site_file, tmp_path, capfd):
    def broken():
        raise FileNotFoundError("patients.npz")

    app = idiolect.flower.client_app(model=lambda: nn.Linear(3, 2), data=broken)
    for name, site in {"broken": app, "good": load(str(site_file), Site, "client_app")}.items():
        worker = Worker(site, {"client-id": name, "state-dir": str(tmp_path / "state")}, tmp_path / name)
        told = {"run": "r", "method": "fedavg", "training": "Training()", "seed": 0, "round": 0, "lr": 0.1, "base": 0}
        told |= {"evaluate": False, "metrics": ["accuracy"], "protocol": 1}
        hello = RecordDict({"words": ConfigRecord(told)})
        hello["model"] = ConfigRecord({"weight": "float32 (2, 3)", "bias": "float32 (2,)", "initial": "x"})
        reply = asked(tmp_path / name, "query", hello)
        if name == "broken":
            assert reply.config_records[FAILED]["why"] == "FileNotFoundError: patients.npz"
            assert "Traceback" in capfd.readouterr().err
            assert FAILED in asked(tmp_path / name, "query", hello)
        else:
            assert reply.config_records["words"]["examples"] == 4
        worker.close()


class Behind(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = (
            self.rfile.read(int(self.headers["content-length"])) if "content-length" in self.headers else self.chunks()
        )
        self.send_response(200)
        self.send_header("x-signed", self.headers.get("x-signed", ""))
        self.end_headers()
        self.wfile.write(self.path.encode() + b" " + body)

    def chunks(self):
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        return found

    def log_message(self, *_):
        pass


def plainly(port, trust, path, length=1):
    """Return the status of a request whose path nobody tidies up on the way."""
    line = socket.create_connection(("127.0.0.1", port))
    with trust.wrap_socket(line, server_hostname="127.0.0.1") if trust else line as wire:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\nconnection: close\r\n\r\nx"
        wire.sendall(head.encode())
        return int(wire.recv(1000).split()[1])


@pytest.mark.parametrize("secure", [False, True])
def test_the_door_passes_sites_and_nobody_else(secure, tmp_path):
    behind = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Behind)
    certificates = None
    if secure:
        ca, _, certificate, key = make_server(tmp_path, ["localhost"])
        certificates = (ca, certificate, key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        behind.socket = context.wrap_socket(behind.socket, server_side=True)
    threading.Thread(target=behind.serve_forever, daemon=True).start()
    port = free_port()
    start_proxy("127.0.0.1", port, behind.server_port, certificates)
    trust = ssl.create_default_context(cafile=str(tmp_path / "ca.crt")) if secure else False
    with httpx.Client(base_url=f"http{'s' * secure}://127.0.0.1:{port}", verify=trust) as site:
        for _ in range(200):
            with contextlib.suppress(httpx.ConnectError):
                site.get("/")
                break
            time.sleep(0.05)
        told = site.post("/v1/fleet/push-object", content=b"body", headers={"x-signed": "yes"})
        assert (told.text, told.headers["x-signed"]) == ("/v1/fleet/push-object body", "yes")
        for path in (
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/start-run",
            "/docs",
            "/",
        ):
            assert site.post(path, content=b"x").status_code == 404, path
        assert plainly(port, trust, "/v1/fleet/push-object", LARGEST + 1) == 413
    behind.shutdown()
    behind.server_close()


def test_a_door_that_cannot_be_opened_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(idiolect.UsageError, match="cannot listen on"):
        start_proxy("127.0.0.1", taken.getsockname()[1], 1, None)


def test_who_may_join_follows_the_folder_of_keys(tmp_path, monkeypatch, capsys):
    asked = []

    def flwr(words, home):
        asked.append(words[1:3])
        if words[1] == "register" and "odd" in words[2]:
            return {"success": False, "error-message": "no such curve"}, ""
        if words[1] == "register" and "spent" in words[2]:
            return {}, "[code: 23] Public key already in use."
        return {"success": True, "node-id": 7000 + len(asked)}, ""

    monkeypatch.setattr(serving, "flwr", flwr)
    keeper = serving.Doorkeeper(tmp_path)
    keys = tmp_path / "sites"
    (keys / "north.pub").write_text("ecdsa a")
    (keys / "odd.pub").write_text("rsa")
    (keys / "spent.pub").write_text("ecdsa b")
    keeper.look()
    keeper.look()
    assert asked == [
        ["register", str(keys / "north.pub")],
        ["register", str(keys / "odd.pub")],
        ["register", str(keys / "spent.pub")],
    ]
    printed = capsys.readouterr().out
    assert "north may join: no key in OpenSSH's form" in printed
    assert "odd cannot be let in: no such curve" in printed
    assert "spent cannot be let in: this key has been let in and turned out before" in printed
    asked.clear()
    serving.Doorkeeper(tmp_path).look()  # after a restart: north is known
    assert [words[0] for words in asked] == ["register", "register"]
    asked.clear()
    (keys / "north.pub").unlink()
    keeper.look()
    assert asked == [["unregister", "7001"]]
    assert "north may join no longer" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_flowers_processes_end_with_the_one_that_started_them(tmp_path):
    """The starter is killed: what it started reads the end of a pipe, and ends itself."""
    script = (
        "import sys, time; from pathlib import Path; from idiolect.flower.server.launch import running, free_port\n"
        "with running('flower-superlink', ['--insecure', '--port', str(free_port())], Path(sys.argv[1]) / 'flower',"
        " Path(sys.argv[1]) / 'log') as process:\n    print(process.pid, flush=True)\n    time.sleep(60)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    deadline = time.monotonic() + 60
    while "running on" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
