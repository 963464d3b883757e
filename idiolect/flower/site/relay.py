"""Flower's app on a site's node: it passes each message to the site's own process and returns the reply.

Flower starts a new process for every message, and this file is all that runs there. It imports neither idiolect nor
torch: the site's own process (`idiolect join`) keeps model, data and state in memory, and answers over a socket in a
folder that only its owner can enter.
"""

from __future__ import annotations

import json
import socket
import struct

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

SOCKET = "socket"
"""Setting of a site: path of the socket."""

FAILED = "failed"
"""Record of a reply: the reason why the site's own process failed."""

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Register."""
    return forward(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    return forward(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate."""
    return forward(message, context)


def forward(message: Message, context: Context) -> Message:
    """Send a message to the site's own process and return its reply."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(context.node_config[SOCKET]))
        send(connection, message.metadata.message_type, message.content)
        _, content = receive(connection)
    if FAILED in content:
        raise RuntimeError(str(content.config_records[FAILED]["reason"]))
    return Message(content, reply_to=message)


def send(connection: socket.socket, kind: str, content: RecordDict) -> None:
    """Send kind and content of a message: the length of a JSON header, the header, and the bytes of the arrays."""
    configs = {name: dict(record) for name, record in content.config_records.items()}
    arrays = [
        (name, key, a.dtype, a.shape, a.stype, len(a.data))
        for name, record in content.array_records.items()
        for key, a in record.items()
    ]
    header = json.dumps({"kind": kind, "configs": configs, "arrays": arrays}).encode()
    connection.sendall(struct.pack(">Q", len(header)) + header)
    for record in content.array_records.values():
        for array in record.values():
            connection.sendall(array.data)


def receive(connection: socket.socket) -> tuple[str, RecordDict]:
    """Return kind and content of a message that `send` has sent."""
    (size,) = struct.unpack(">Q", _receive_exactly(connection, 8))
    header = json.loads(_receive_exactly(connection, size))
    content = RecordDict({name: ConfigRecord(config) for name, config in header["configs"].items()})
    for name, key, dtype, shape, stype, length in header["arrays"]:
        record = content.array_records.get(name) or ArrayRecord()
        record[key] = Array(dtype, tuple(shape), stype, _receive_exactly(connection, length))
        content[name] = record
    return header["kind"], content


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    received = bytearray(size)
    view = memoryview(received)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the connection was closed in the middle of a message")
        view = view[count:]
    return bytes(received)
