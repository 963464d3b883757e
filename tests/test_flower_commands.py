"""Keys, the proxy, workers and error messages of the commands for sites; one test starts a Flower process."""

import contextlib
import hashlib
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
from idiolect.flower.app_file import load_app
from idiolect.flower.server import serve as serve_module
from idiolect.flower.server.keys import make_server, make_site
from idiolect.flower.server.proxy import MAX_REQUEST, start_proxy
from idiolect.flower.site.app import Site
from idiolect.flower.site.join import _explain, _is_reachable
from idiolect.flower.site.relay import FAILED, receive, send
from idiolect.flower.site.relay_server import RelayServer
from idiolect.flower.system.files import lock_file
from idiolect.flower.system.launch import flower_environment, free_port, last_error


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def usage_error(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_the_authority_signs_the_server_and_its_keys_are_private(tmp_path):
    ca, ca_key, certificate, key = make_server(tmp_path / "server", ["server.example.org", "10.0.0.7"])
    root, leaf = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (ca, certificate))
    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example.org", "localhost"]
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
    assert "never overwritten" in usage_error(capsys, "keys", tmp_path, "--site", "north")
    assert private.read_bytes() == before


def test_keys_need_a_host_or_a_site(tmp_path, capsys):
    assert "--host NAME for a server, or --site NAME" in usage_error(capsys, "keys", tmp_path)


def test_serve_needs_certificates_or_insecure(tmp_path, capsys):
    error = usage_error(capsys, "serve", tmp_path / "server")
    assert "ca.crt is missing: create it with `idiolect keys" in error
    assert "--insecure" in error
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


def test_join_needs_a_site_and_its_key(site_file, tmp_path, capsys):
    options = ("--as", "north", "--server", "127.0.0.1:1", "--folder", tmp_path / "north")
    assert "ca.crt is missing: ask the coordinator" in usage_error(capsys, "join", site_file, *options)
    (tmp_path / "north" / "ca.crt").write_text("x")
    assert "north.key is missing: create it with `idiolect keys" in usage_error(capsys, "join", site_file, *options)
    assert "missing.py is not a Python file" in usage_error(
        capsys, "join", tmp_path / "missing.py", *options, "--insecure"
    )
    assert "has no other = idiolect.flower.client_app" in usage_error(
        capsys, "join", f"{site_file}:other", *options, "--insecure"
    )
    invalid = ("--as", "../north", "--server", "127.0.0.1:1", "--folder", tmp_path / "north", "--insecure")
    assert "invalid client name" in usage_error(capsys, "join", site_file, *invalid)


COORDINATOR = """
import idiolect
import idiolect.flower
from torch import nn

app = idiolect.flower.server_app(model=lambda: nn.Linear(3, 2), method=idiolect.methods.fedavg(), rounds=3)
"""


def test_submit_needs_a_server_and_a_plain_assignment(tmp_path, capsys):
    file, server = tmp_path / "coordinator.py", tmp_path / "server"
    file.write_text(COORDINATOR.replace("app =", "app: object ="))
    assert "there is no server in" in usage_error(capsys, "submit", file, server)
    (server / "flower").mkdir(parents=True)
    (server / "flower" / "config.toml").write_text("")
    assert "has no plain `app = idiolect.flower.server_app(...)`" in usage_error(capsys, "submit", file, server)
    assert "is not a Python file" in usage_error(capsys, "submit", tmp_path / "missing.py", server)
    file.write_text("app = 3\n")
    assert "has no app = idiolect.flower.server_app(...)" in usage_error(capsys, "submit", file, server)
    file.write_text(COORDINATOR.replace("rounds", "roundss"))
    assert "coordinator.py cannot be run: TypeError: server_app() got an unexpected" in usage_error(
        capsys, "submit", file, server
    )


def test_a_folder_joins_once(site_file, tmp_path, capsys):
    (tmp_path / "north").mkdir()
    lock = lock_file(tmp_path / "north" / "north.lock")
    options = ("--as", "north", "--server", "127.0.0.1:1", "--folder", tmp_path / "north", "--insecure")
    assert f"is in use by process {os.getpid()}" in usage_error(capsys, "join", site_file, *options)
    os.close(lock)


def test_errors_of_a_connection_are_explained():
    assert "ca.crt is not the authority" in _explain("x [SSL: CERTIFICATE_VERIFY_FAILED] y", "north")
    assert "no north.pub" in _explain("[code: 2004] Failed to activate SuperNode.", "north")
    assert _explain("no room", "north") == "disconnected: no room"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert _is_reachable(f"127.0.0.1:{listener.getsockname()[1]}")
    assert not _is_reachable(f"127.0.0.1:{free_port()}")
    with pytest.raises(idiolect.UsageError, match="use HOST:PORT"):
        _is_reachable("server")


def test_the_status_of_a_run(tmp_path, capsys):
    assert "no run has started in" in usage_error(capsys, "status", tmp_path)
    (tmp_path / "run").mkdir()
    site = {"state": "working", "examples": 462, "last_seen": time.time() - 90}
    site |= {"bytes_up": 2_500_000, "bytes_down": 3_000_000}
    found = {"time": time.time(), "round": 2, "rounds": 5, "phase": "1 of 2 results, 30 s left"}
    sites = {"north": {**site, "metrics": {"accuracy": 0.75}}, "south": {"state": "offline", "examples": 3}}
    (tmp_path / "run" / "status.json").write_text(json.dumps({**found, "sites": sites}))
    event = {"time": "2026-11-24T10:11:12+00:00", "round": 2, "client": "south", "event": "offline"}
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert cli.main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "2 of 5 rounds completed; 1 of 2 results, 30 s left",
        "1 min ago",
        "0.7500",
        "2.50",
        "10:11:12  south: offline",
    ):
        assert text in printed, printed


def test_the_last_error_in_a_log_is_one_line(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "\x1b[91mERROR\x1b[0m: Exit Code: 305\nFailed to connect.\n[code: 2004] No such key.\nINFO: Shutting down\n"
    )
    assert last_error(log) == "Failed to connect. [code: 2004] No such key."
    log.write_text("one\ntwo\n\nthree\nfour\n")
    assert last_error(log) == "two three four"


def test_telemetry_update_checks_and_installations_are_off(tmp_path):
    env = flower_environment(tmp_path / "home")
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert Path(env["FLWR_HOME"]) == tmp_path / "home"
    assert mode(tmp_path / "home") == 0o700


def test_a_message_is_unchanged_after_a_socket():
    weights = torch.randn(3, 2)
    content = RecordDict(
        {"broadcast/share": ArrayRecord({"w": Array(weights.numpy()), "b": Array(torch.zeros(0).numpy())})}
    )
    content["fields"] = ConfigRecord(
        {"lr": 0.1, "round": 3, "names": ["a", "b"], "rows": [1.5, float("inf")], "yes": True}
    )
    one, other = socket.socketpair()
    with one, other:
        threading.Thread(target=send, args=(one, "train", content)).start()
        kind, found = receive(other)
    assert kind == "train"
    assert dict(found.config_records["fields"]) == dict(content.config_records["fields"])
    assert found.array_records["broadcast/share"]["w"].data == content.array_records["broadcast/share"]["w"].data
    assert found.array_records["broadcast/share"]["b"].shape == (0,)


def test_a_connection_that_closes_in_the_middle_of_a_message_is_an_error():
    one, other = socket.socketpair()
    with other:
        one.sendall(b"\0\0\0\0\0\0\0\x09{")
        one.close()
        with pytest.raises(ConnectionError, match="was closed"):
            receive(other)


def request(path, kind, content):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        send(connection, kind, content)
        return receive(connection)[1]


def test_a_worker_survives_errors_of_user_code(site_file, tmp_path, capfd):
    def broken():
        raise FileNotFoundError("patients.npz")

    app = idiolect.flower.client_app(model=lambda: nn.Linear(3, 2), data=broken)
    for name, site in {"broken": app, "good": load_app(str(site_file), Site, "client_app")}.items():
        worker = RelayServer(site, {"client-id": name, "state-dir": str(tmp_path / "state")}, tmp_path / name)
        fields = {"run": "r", "method": "fedavg", "training": "Training()", "seed": 0, "round": 0, "lr": 0.1}
        fields |= {"base_round": 0, "evaluate": False, "metrics": ["accuracy"], "protocol": 1}
        registration = RecordDict({"fields": ConfigRecord(fields)})
        form = {"weight": "float32 (2, 3)", "bias": "float32 (2,)"}
        nothing = hashlib.sha256(b"[]").hexdigest()  # no frozen parameters, no adapters
        registration["model"] = ConfigRecord({**form, "initial": "x", "frozen": nothing})
        reply = request(tmp_path / name, "query", registration)
        if name == "broken":
            assert reply.config_records[FAILED]["reason"] == "FileNotFoundError: patients.npz"
            assert "Traceback" in capfd.readouterr().err
            assert FAILED in request(tmp_path / name, "query", registration)
        else:
            assert reply.config_records["fields"]["examples"] == 4
        worker.close()


class FakeFlower(http.server.BaseHTTPRequestHandler):
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


def raw_request(port, trust, path, length=1):
    """Return the status of a request whose path is sent without normalization."""
    plain = socket.create_connection(("127.0.0.1", port))
    with trust.wrap_socket(plain, server_hostname="127.0.0.1") if trust else plain as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\nconnection: close\r\n\r\nx"
        connection.sendall(head.encode())
        return int(connection.recv(1000).split()[1])


@pytest.mark.parametrize("secure", [False, True])
def test_the_proxy_forwards_only_the_requests_of_sites(secure, tmp_path):
    flower = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeFlower)
    certificates = None
    if secure:
        ca, _, certificate, key = make_server(tmp_path, ["localhost"])
        certificates = (ca, certificate, key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        flower.socket = context.wrap_socket(flower.socket, server_side=True)
    threading.Thread(target=flower.serve_forever, daemon=True).start()
    port = free_port()
    start_proxy("127.0.0.1", port, flower.server_port, certificates)
    trust = ssl.create_default_context(cafile=str(tmp_path / "ca.crt")) if secure else False
    with httpx.Client(base_url=f"http{'s' * secure}://127.0.0.1:{port}", verify=trust) as site:
        for _ in range(200):
            with contextlib.suppress(httpx.ConnectError):
                site.get("/")
                break
            time.sleep(0.05)
        response = site.post("/v1/fleet/push-object", content=b"body", headers={"x-signed": "yes"})
        assert (response.text, response.headers["x-signed"]) == ("/v1/fleet/push-object body", "yes")
        for path in (
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/start-run",
            "/docs",
            "/",
        ):
            assert site.post(path, content=b"x").status_code == 404, path
        assert raw_request(port, trust, "/v1/fleet/push-object", MAX_REQUEST + 1) == 413
    flower.shutdown()
    flower.server_close()


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(idiolect.UsageError, match="cannot listen on"):
        start_proxy("127.0.0.1", taken.getsockname()[1], 1, None)


def test_registered_sites_follow_the_folder_of_keys(tmp_path, monkeypatch, capsys):
    calls = []

    def run_flwr(arguments, home):
        calls.append(arguments[1:3])
        if arguments[1] == "register" and "rsa" in arguments[2]:
            return {"success": False, "error-message": "no such curve"}, ""
        if arguments[1] == "register" and "used" in arguments[2]:
            return {}, "[code: 23] Public key already in use."
        return {"success": True, "node-id": 7000 + len(calls)}, ""

    monkeypatch.setattr(serve_module, "run_flwr", run_flwr)
    registry = serve_module.SiteRegistry(tmp_path)
    keys = tmp_path / "sites"
    (keys / "north.pub").write_text("ecdsa a")
    (keys / "rsa.pub").write_text("rsa")
    (keys / "used.pub").write_text("ecdsa b")
    registry.update()
    registry.update()
    assert calls == [
        ["register", str(keys / "north.pub")],
        ["register", str(keys / "rsa.pub")],
        ["register", str(keys / "used.pub")],
    ]
    printed = capsys.readouterr().out
    assert "site north may join: not a public key in OpenSSH format" in printed
    assert "key of site rsa rejected: no such curve" in printed
    assert "key of site used rejected: this key was removed before" in printed
    calls.clear()
    serve_module.SiteRegistry(tmp_path).update()  # after a restart: north is still registered
    assert [arguments[0] for arguments in calls] == ["register", "register"]
    calls.clear()
    (keys / "north.pub").unlink()
    registry.update()
    assert calls == [["unregister", "7001"]]
    assert "site north removed" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_flowers_processes_end_with_their_parent(tmp_path):
    """The parent is killed; its child reads the end of a pipe and ends itself."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from idiolect.flower.system.launch import flower_process, free_port\n"
        "folder, arguments = Path(sys.argv[1]), ['--insecure', '--port', str(free_port())]\n"
        "with flower_process('flower-superlink', arguments, folder / 'flower', folder / 'log') as process:\n"
        "    print(process.pid, flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while "running on" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
