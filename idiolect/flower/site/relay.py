"""Hands a message to the process in which a site is ready for it, and takes its reply back to Flower.

Flower starts a new process for every message. This file is what runs in it, so it imports neither idiolect nor torch:
the site's own process (`idiolect join`) has model, data and state at hand and answers over a socket in a folder that
only its owner can enter.
"""

from __future__ import annotations

import json
import socket
import struct

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

SOCKET = "socket"
"""The setting of a site that names the socket."""

FAILED = "failed"
"""The record that says that the site's own process failed."""

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this is."""
    return hand_over(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Play a round."""
    return hand_over(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure."""
    return hand_over(message, context)


def hand_over(message: Message, context: Context) -> Message:
    """Return the site's reply to a message."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(context.node_config[SOCKET]))
        send(line, message.metadata.message_type, message.content)
        _, content = receive(line)
    if FAILED in content:
        raise RuntimeError(str(content.config_records[FAILED]["why"]))
    return Message(content, reply_to=message)


def send(line: socket.socket, kind: str, content: RecordDict) -> None:
    """Send a message's kind and content: a head in JSON, then the bytes of the arrays."""
    told = {name: dict(record) for name, record in content.config_records.items()}
    arrays = [
        (name, key, a.dtype, a.shape, a.stype, len(a.data))
        for name, record in content.array_records.items()
        for key, a in record.items()
    ]
    head = json.dumps({"kind": kind, "told": told, "arrays": arrays}).encode()
    line.sendall(struct.pack(">Q", len(head)) + head)
    for record in content.array_records.values():
        for array in record.values():
            line.sendall(array.data)


def receive(line: socket.socket) -> tuple[str, RecordDict]:
    """Return the kind and the content of a message that `send` sent."""
    (size,) = struct.unpack(">Q", _exactly(line, 8))
    head = json.loads(_exactly(line, size))
    content = RecordDict({name: ConfigRecord(told) for name, told in head["told"].items()})
    for name, key, dtype, shape, stype, length in head["arrays"]:
        record = content.array_records.get(name) or ArrayRecord()
        record[key] = Array(dtype, tuple(shape), stype, _exactly(line, length))
        content[name] = record
    return head["kind"], content


def _exactly(line: socket.socket, size: int) -> bytes:
    found = bytearray(size)
    view = memoryview(found)
    while view:
        count = line.recv_into(view)
        if not count:
            raise ConnectionError("the site's process has gone")
        view = view[count:]
    return bytes(found)
