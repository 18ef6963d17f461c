"""Ports for servers that take a number and no socket."""
from __future__ import annotations

import socket


def free_port() -> int:
    "One that nothing else on this machine is given within a minute: it rests in TIME_WAIT, where a server may take it (all here set SO_REUSEADDR)."
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        server.accept()[0].close()
        return server.getsockname()[1]
