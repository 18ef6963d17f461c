"""Connections that are slow, endless or kept for nothing, against the real protocol in this process, with short limits."""
from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from recsys.serving import sockets
from recsys.serving.limits import Pressure
from recsys.serving.sockets import Patient, sweep
from recsys.serving.turns import FIRST, Turns

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: dict, receive: Callable, send: Callable) -> None:
    "Answers at once with what it measured, or after its body where it is asked to read it, or with more than any buffer holds."
    if scope["path"] == "/read":
        while (await receive()).get("more_body"): pass
    body = b"x" * (50_000_000 if scope["path"] == "/large" else 2)
    status = 413 if scope["path"] == "/refuse" else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def against(visit: Callable[[int, ServerState], Awaitable[Any]], *, app: Callable = app, **has: Any) -> Any:
    "What a visit to a server returns, whose connections have these attributes."
    async def run() -> Any:
        config, state, loop = uvicorn.Config(app, log_config=None), ServerState(), asyncio.get_running_loop()
        config.load()
        def begin() -> Patient:
            made = Patient(config, state, {})
            for name, value in has.items(): setattr(made, name, value)
            return made
        server = await loop.create_server(begin, "127.0.0.1", 0)
        sweeping = asyncio.create_task(sweep(state.connections, every=0.02))
        try: return await asyncio.wait_for(visit(server.sockets[0].getsockname()[1], state), 30)
        finally:
            sweeping.cancel()
            server.close()
            for connection in list(state.connections): connection.transport.abort()
    return asyncio.run(run())


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sockets, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(sockets, "READ_SECONDS", 0.1)


async def drip(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    "All that comes back until the server ends the connection."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause)
    said = await reader.read()
    writer.close()
    return said


def test_a_head_that_drips_is_told_and_ended():
    said = against(lambda port, _: drip(port, b"GET / HT", b"TP/1.1\r\n"))
    assert said.startswith(b"HTTP/1.1 408") and b"application/problem+json" in said


def test_a_connection_that_says_nothing_is_ended_without_a_word():
    assert against(lambda port, _: drip(port)) == b""


def test_a_head_without_end_is_refused_before_it_is_held():
    assert against(lambda port, _: drip(port, b"GET / HTTP/1.1\r\n", *[b"x: " + b"y" * 10_000 + b"\r\n"] * 6, b"x: " + b"y" * 5_600)).startswith(b"HTTP/1.1 431")
    assert against(lambda port, _: drip(port, b"GET /" + b"y" * 65_600)).startswith(b"HTTP/1.1 431")


def test_the_rest_of_a_refused_body_may_come_but_not_for_ever():
    head = b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n"
    whole = against(lambda port, _: drip(port, head + b"x" * 500_000 + GET.replace(b"Host: x", b"Connection: close")))  # the connection still works afterwards
    assert whole.startswith(b"HTTP/1.1 413") and whole.count(b"HTTP/1.1 200") == 1
    assert against(lambda port, _: drip(port, head + b"x")).startswith(b"HTTP/1.1 413")  # and nothing more: ended by the server


def test_a_client_that_does_not_read_is_cut_off():
    async def visit(port: int, state: ServerState) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        while not state.connections: await asyncio.sleep(0.01)
        while state.connections: await asyncio.sleep(0.01)
        writer.transport.abort()
        return len(state.connections)
    assert against(visit) == 0


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_forgotten():
    async def visit(port: int, state: ServerState) -> int:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        while not state.tasks: await asyncio.sleep(0.01)
        writer.write_eof()
        while state.connections or state.tasks: await asyncio.sleep(0.01)
        writer.close()
        return len(state.connections)
    assert against(visit) == 0


def test_what_comes_while_the_worker_stops_is_answered_and_ends_the_connection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sockets, "HEAD_SECONDS", 10)
    monkeypatch.setattr(sockets, "DRAIN_SECONDS", 5)

    async def visit(port: int, state: ServerState) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        first = await reader.readuntil(b"xx")
        for connection in list(state.connections): connection.shutdown()
        writer.write(GET)
        then = await reader.read()
        writer.close()
        return first, then
    first, then = against(visit)
    assert b"connection: close" not in first and then.startswith(b"HTTP/1.1 200") and b"connection: close" in then


def test_an_idle_connection_ends_soon_after_the_stop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sockets, "HEAD_SECONDS", 10)
    monkeypatch.setattr(sockets, "DRAIN_SECONDS", 0.05)

    async def visit(port: int, state: ServerState) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await reader.readuntil(b"xx")
        for connection in list(state.connections): connection.shutdown()
        rest = await reader.read()
        writer.close()
        return rest
    assert against(visit) == b""


@pytest.mark.parametrize("in_turns", [True, False])
def test_who_comes_while_others_are_answered_is_heard_before_they_all_are(in_turns: bool):
    said: list[str] = []

    async def slow(scope: dict, receive: Callable, send: Callable) -> None:
        pressure.begins(scope["ahead"], 0.0, now=0.0)
        if not said: late.sendall(GET.replace(b"GET /", b"GET /late"))  # it lies in the socket before the first answer is done
        said.append(scope["path"])
        time.sleep(0.003)
        await app(scope | {"path": "/"}, receive, send)

    async def visit(port: int, _: ServerState) -> None:
        late.connect(("127.0.0.1", port))
        many = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in many: writer.write(GET)
        for reader, _ in many: await reader.readuntil(b"xx")
        while "/late" not in said: await asyncio.sleep(0.001)
        for _, writer in many: writer.close()

    class Heard(Pressure):
        def comes(self, *, now: float) -> int:
            said.append("heard") if said else None
            return super().comes(now=now)

    pressure = Heard(target=1.0, most=100)
    with socket.socket() as late: against(visit, app=slow, pressure=pressure, **({"turns": Turns()} if in_turns else {}))
    assert said.count("/") == 20 and pressure.queued == 0
    assert (said[:said.index("heard")].count("/") <= FIRST + 1) is in_turns  # else, all that the loop had read were answered first
