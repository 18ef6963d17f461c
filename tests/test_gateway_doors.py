"""Who gets in, how often, and over what: keys, rates, overload, browsers, TLS, and the end of a worker; on real processes."""
from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import signal
import socket
import sqlite3
import ssl
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from gateway_process import WORKER, Gateway, running, wait_for

from recsys.lake.eventlog import SQLiteEventLog
from recsys.serving.audit import Audit
from recsys.serving.auth import Keys
from recsys.serving.client import Client, Refusal
from recsys.serving.gateway import NotLoopback, _cross_origin, check_address
from recsys.serving.http import Front, Routes
from recsys.serving.limits import Pressure
from recsys.serving.tls import self_signed, trusting

SHOP = "https://shop.example"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory):
    with running(tmp_path_factory.mktemp("doors") / "home", workers=2, RECSYS_GATEWAY_ORIGINS=SHOP, RECSYS_GATEWAY_RATE_BURST="20") as gateway: yield gateway


def made(gateway: Gateway, *scopes: str, **kw) -> str:
    keys = Keys(gateway.home.keys)
    try: return keys.create(scopes, name="made", **kw)
    finally: keys.close()


def bearer(key: str) -> dict[str, str]: return {"Authorization": f"Bearer {key}"}


def test_a_rate_is_one_for_all_workers(gateway: Gateway):
    key = made(gateway, "recs:read", rate=0.001)
    answers = [gateway.post("/v1/recommendations", {"k": 1}, headers=bearer(key)) for _ in range(30)]  # each on a connection of its own
    assert [a.status_code for a in answers] == [200] * 20 + [429] * 10
    last = answers[-1]
    assert int(last.headers["retry-after"]) > 0 and last.headers["ratelimit"].startswith('"key";r=0') and last.json()["type"] == "/docs#too-many"
    assert answers[0].headers["ratelimit"].startswith('"key";r=19') and answers[0].headers["ratelimit-policy"] == '"key";q=20;w=20000'
    assert gateway.recommend(k=1).status_code == 200  # another key has an account of its own, and no rate no headers
    assert "ratelimit" not in gateway.recommend(k=1).headers


def test_a_batch_counts_as_what_it_holds(gateway: Gateway):
    key, asked = made(gateway, "recs:read", rate=0.001), {"requests": [{"k": 1}] * 8}
    answers = [gateway.post("/v1/recommendations/batch", asked, headers=bearer(key)) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429] and len(answers[0].json()["answers"]) == 8


def test_a_key_without_the_scope_leaves_a_line_for_the_auditor(gateway: Gateway):
    key = made(gateway, "recs:read")
    for method, path, body in (("POST", "/v1/events", {"events": []}), ("PUT", "/v1/items", {"items": []})):
        with gateway.client() as client: assert client.request(method, path, json=body, headers=bearer(key)).status_code == 403
    lines = [line for line in Audit(gateway.home.audit).read() if line["what"] == "scope refused" and line["key"] == key.split("_")[1]]
    assert [(line["scope"], line["route"]) for line in lines] == [("events:write", "/v1/events"), ("items:write", "/v1/items")]
    assert key.split("_", 2)[2] not in "".join(p.read_text() for p in gateway.home.audit.iterdir()) and all(p.stat().st_mode & 0o077 == 0 for p in gateway.home.audit.iterdir())


def test_an_administrator_reads_a_receipt_and_it_is_on_record(gateway: Gateway):
    key, id = made(gateway, "admin"), gateway.recommend(user_id="receipt", k=2).json()["recommendation_id"]
    with gateway.client(headers=bearer(key)) as client:
        found, unknown, option = (client.get(f"/v1/recommendations/{i}", timeout=60) for i in (id, "0" * 32, "--help"))
    assert found.status_code == 200 and found.json()["recommendation_id"] == id and len(found.json()["slots"]) == 2 and "receipt" not in found.json()["user_id"]
    assert unknown.status_code == option.status_code == 404 and unknown.json()["field"] == "recommendation_id"
    assert gateway.get(f"/v1/recommendations/{id}").status_code == 401 and gateway.client().get(f"/v1/recommendations/{id}").status_code == 403
    assert [line["recommendation"] for line in Audit(gateway.home.audit).read() if line["what"] == "receipt read"] == [id]


def test_an_expired_key_is_refused(gateway: Gateway):
    key = made(gateway, "recs:read", expires_days=1e-9)  # not even a millisecond
    assert gateway.post("/v1/recommendations", {}, headers=bearer(key)).json()["rule"].endswith("this key has expired")


def test_no_secret_and_no_raw_id_of_a_person_is_written_anywhere(gateway: Gateway):
    key, planted = made(gateway, "events:write", "recs:read"), "planted-person@example.org"
    with httpx.Client(base_url=gateway.url, headers=bearer(key), verify=False) as client:
        client.post("/v1/events", json={"events": [{"event_id": "planted-1", "user_id": planted, "session_id": planted, "item_id": "mug", "type": "view"}, {"user_id": planted}]})
        client.post("/v1/recommendations", json={"user_id": planted})
        client.post("/v1/recommendations", json={"user_id": planted, "k": planted})
        client.post("/v1/recommendations/batch", json={"requests": [{"user_id": planted}, {"user_id": planted, "surface": planted + "\n"}]})
        client.get(f"/v1/items/{planted}/similar?surface={planted}&k={planted}")
        client.get(f"/{planted}?{planted}={planted}", headers={"X-Request-ID": planted, "User-Agent": planted, "Cookie": planted})
        client.put("/v1/items", json={"items": [{"item_id": planted}]})  # 403, and an audit line
        client.request("PLANTED", "/v1/events", content=planted)
    socket_of(gateway, f"{planted}\r\n\r\n".encode())
    written = {p: p.read_bytes() for p in gateway.home.path.rglob("*") if p.is_file() and p.parent != gateway.home.keys}
    metrics = gateway.get("/metrics").content
    for secret in (planted.encode(), key.split("_", 2)[2].encode(), gateway.key.split("_", 2)[2].encode()):
        assert not [p for p, content in written.items() if secret in content] and secret not in metrics


def socket_of(gateway: Gateway, sent: bytes) -> bytes:
    "What comes back for some bytes, to the end of the connection."
    with socket.create_connection(("127.0.0.1", gateway.listener.getsockname()[1]), timeout=20) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_half_closed_gets_its_answer_and_noise_a_problem(gateway: Gateway):
    answer = socket_of(gateway, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b'{"status":"ok"}')
    for noise, status in ((b"NOISE\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x: y\r\n" * 20_000, b"431")):
        answer = socket_of(gateway, noise)
        assert answer.startswith(b"HTTP/1.1 " + status) and b"application/problem+json" in answer, answer[:200]


def test_only_listed_origins_may_be_read_by_a_browser(gateway: Gateway):
    with gateway.client() as client:
        ours = client.post("/v1/recommendations", json={"k": "x"}, headers={"Origin": SHOP})  # refusals must be readable, too
        theirs = client.post("/v1/recommendations", json={"k": 1}, headers={"Origin": "https://evil.example"})
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        before, denied = (client.options("/v1/events", headers={"Origin": o, **asks}) for o in (SHOP, "https://evil.example"))
    assert ours.headers["access-control-allow-origin"] == SHOP and "Retry-After" in ours.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in theirs.headers and theirs.status_code == 200
    assert before.status_code == 200 and before.headers["access-control-allow-origin"] == SHOP and denied.status_code == 400


def test_beyond_its_limit_a_worker_turns_away_and_answers_what_it_took(tmp_path: Path):
    with running(tmp_path / "home", RECSYS_GATEWAY_MAX_UNDER_WAY="3") as gateway:
        held = sqlite3.connect(gateway.home.eventlog / "events.sqlite", timeout=20, isolation_level=None)
        held.execute("BEGIN IMMEDIATE")  # nothing can be committed: what is taken stays under way
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            sent = [pool.submit(gateway.events, {"event_id": f"e{n}", "user_id": "ann", "item_id": "mug", "type": "view"}) for n in range(8)]
            wait_for(lambda: sum(s.done() for s in sent) >= 5)
            refused = gateway.recommend(k=1)
            alive = gateway.get("/healthz"), gateway.get("/readyz")
            held.execute("COMMIT")
            held.close()
            answers = [s.result() for s in sent]
        statuses = sorted(a.status_code for a in answers)
        assert set(statuses) == {202, 503} and statuses.count(202) <= 4 and refused.status_code == 503  # one more may come between a check and the next
        assert all(a.headers["retry-after"] == "1" and a.json()["type"] == "/docs#overloaded" for a in [refused, *answers] if a.status_code == 503)
        assert [a.status_code for a in alive] == [200, 200]
        log = SQLiteEventLog(gateway.home.eventlog)
        assert log.depth("events", after=0) == statuses.count(202)  # what was turned away was not stored
        log.close()
        with Client(gateway.url, gateway.key) as client: assert client.recommend(k=1).items  # and it recovers by itself


FULL = WORKER.replace("serve(home", """
from recsys.serving.limits import Pressure
as_it_is = Pressure.full
Pressure.full = lambda self, *, now: "full" if (home.path / "full").exists() else as_it_is(self, now=now)
serve(home""")


def spoken(gateway: Gateway, *requests: bytes) -> list[tuple[int, bytes]]:
    "Statuses and bodies of requests on one connection, one after the other."
    got = []
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=30) as connection, connection.makefile("rb") as lines:
        for request in requests:
            connection.sendall(request)
            status, length = int(lines.readline().split()[1]), 0
            while (line := lines.readline().strip()): length = int(line.partition(b":")[2]) if line.lower().startswith(b"content-length:") else length
            got.append((status, lines.read(length)))
    return got


def asked(gateway: Gateway, body: bytes, *, method: str = "POST", path: str = "/v1/recommendations", more: bytes = b"") -> bytes:
    return b"%s %s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\ncontent-length: %d\r\n%s\r\n%s" % (method.encode(), path.encode(), gateway.key.encode(), len(body), more, body)


def test_who_is_turned_away_at_the_gate_keeps_the_connection(tmp_path: Path):
    with running(tmp_path / "home", program=FULL) as gateway:
        full, list_of_one = gateway.home.path / "full", asked(gateway, b'{"k": 1}')
        long = asked(gateway, b'{"k": 1' + b" " * 300_000 + b"}", more=b"x-request-id: mine-7\r\n")
        full.touch()
        first = spoken(gateway, list_of_one, long, list_of_one, asked(gateway, b"", method="GET", path="/healthz"), asked(gateway, b"", method="GET", path="/nowhere"))
        with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.key}"}) as client: last = client.post("/v1/events", json={"events": []}, headers={"Connection": "close"})
        full.unlink()
        assert [status for status, _ in first] == [503, 503, 503, 200, 404] and b'"mine-7"' in first[1][1] and len({body for _, body in first[:3]}) == 3
        assert last.status_code == 503 and last.headers["retry-after"] == "1" and last.json()["request_id"] == last.headers["x-request-id"]
        assert [status for status, _ in spoken(gateway, list_of_one, list_of_one)] == [200, 200]
        wait_for(lambda: gateway.measured("recsys_http_requests_total") > 0 and 'status="503"' in gateway.get("/metrics").text)


def test_a_preflight_has_its_turn_like_any_request():
    "What CORS answers by itself must not be counted as waiting for ever."
    pressure = Pressure(target=0.02, most=100)
    app = _cross_origin(Front(Routes(()), pressure=pressure), (SHOP,))
    async def send(message: object) -> None: return None
    async def receive() -> dict: return {"type": "http.request", "body": b"", "more_body": False}
    def scope(method: str) -> dict:
        now = time.perf_counter()
        return {"type": "http", "method": method, "path": "/v1/events", "raw_path": b"/v1/events", "query_string": b"", "arrived": now, "ahead": pressure.comes(now=now), "whole": True,
                "headers": [(b"origin", SHOP.encode()), (b"access-control-request-method", b"POST")]}
    for method in ("OPTIONS", "POST", "OPTIONS"): asyncio.run(app(scope(method), receive, send))
    assert pressure.queued == 0 == pressure.under_way


def connections_of(gateway: Gateway) -> list[int]:
    port = int(gateway.url.rpartition(":")[2])
    return [sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in psutil.Process(w.pid).net_connections("tcp")) for w in gateway.workers if w.poll() is None]


def test_connections_are_shared_and_nobody_waits_for_a_worker_that_is_stuck(tmp_path: Path):
    with running(tmp_path / "home", workers=2) as gateway, contextlib.ExitStack() as stack:
        port = int(gateway.url.rpartition(":")[2])
        def connect(n: int) -> list[socket.socket]: return [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(n)]
        connect(16)
        wait_for(lambda: sum(connections_of(gateway)) == 16)
        assert max(connections_of(gateway)) <= 10
        gateway.workers[0].send_signal(signal.SIGSTOP)
        try:
            connect(8)
            for _ in range(3): assert gateway.recommend(k=1).status_code == 200
        finally: gateway.workers[0].send_signal(signal.SIGCONT)
        gateway.workers[0].kill()
        gateway.workers[0].wait()
        assert gateway.recommend(k=1).status_code == 200


def test_a_flood_is_shed_and_nothing_else_fails(tmp_path: Path):
    with running(tmp_path / "home", RECSYS_GATEWAY_MAX_WAIT_MS="0.001") as gateway:
        body = b'{"items": ["mug"], "k": 9}'
        asked = b"POST /v1/recommendations HTTP/1.1\r\nhost: shop\r\nauthorization: Bearer %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (gateway.key.encode(), len(body), body)

        async def ask(times: int) -> list[tuple[int, str | None]]:
            reader, writer = await asyncio.open_connection(*gateway.listener.getsockname())
            writer.write(asked * times)  # nobody waits for an answer before the next question, so that others always stand in line
            try: return [await answer(reader) for _ in range(times)]
            finally: writer.close()

        async def answer(reader: asyncio.StreamReader) -> tuple[int, str | None]:
            first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in rest)
            await reader.readexactly(int(headers["content-length"]))
            return int(first.split()[1]), headers.get("retry-after")

        async def flood() -> list[tuple[int, str | None]]: return sum(await asyncio.gather(*(ask(40) for _ in range(100))), [])
        answers = asyncio.run(flood())
        assert len(answers) == 4000 and set(answers) == {(200, None), (503, "1")}
        assert gateway.get("/healthz").status_code == 200 and all(w.poll() is None for w in gateway.workers)


def test_tls_with_a_renewed_certificate(tmp_path: Path):
    cert, key = self_signed(tmp_path, ["shop.example"])
    with running(tmp_path / "home", host="0.0.0.0", RECSYS_GATEWAY_TLS_CERT=str(cert), RECSYS_GATEWAY_TLS_KEY=str(key)) as gateway:
        with Client(gateway.url, gateway.key, ca=cert) as client: assert len(client.recommend(k=3).items) == 3
        with Client(gateway.url, gateway.key, retries=0) as client, pytest.raises(Refusal, match="CERTIFICATE_VERIFY_FAILED"): client.recommend()
        port = gateway.listener.getsockname()[1]
        with pytest.raises(httpx.TransportError): httpx.get(f"http://127.0.0.1:{port}/healthz")

        def shown() -> bytes:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as secure:
                assert secure.version() in ("TLSv1.2", "TLSv1.3")
                return secure.getpeercert(binary_form=True)
        before = shown()
        key.write_bytes(key.read_bytes()[:50])  # half of a renewal changes nothing
        wait_for(lambda: any(line["event"] == "certificate not taken" for line in gateway.log()))
        assert shown() == before
        self_signed(tmp_path, ["shop.example"])
        wait_for(lambda: shown() != before)
        with httpx.Client(base_url=gateway.url, verify=trusting(cert)) as client: assert client.get("/healthz").status_code == 200


def test_other_addresses_need_tls():
    for host in ("0.0.0.0", "192.0.2.1", "::", "shop.example"):
        with pytest.raises(NotLoopback, match="recsys keys tls"): check_address(host, secure=False)
        check_address(host, secure=True)
    check_address("127.0.0.1", secure=False)


def test_a_worker_that_stops_costs_nobody_a_request(tmp_path: Path):
    with running(tmp_path / "home", workers=2) as gateway:
        stop, answers, errors = threading.Event(), [], []

        def ask(keep: bool) -> None:
            with gateway.client() as kept:
                while not stop.is_set():
                    with contextlib.nullcontext(kept) if keep else gateway.client() as client:
                        try: answers.append(client.post("/v1/recommendations", json={"items": ["mug"], "k": 3}).status_code)
                        except httpx.TransportError as e: errors.append(repr(e))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for keep in (True, True, False, False): pool.submit(ask, keep)
            try:
                wait_for(lambda: len(answers) > 40)
                gateway.workers[0].send_signal(signal.SIGTERM)
                wait_for(lambda: gateway.workers[0].poll() is not None)
                ended = len(answers)
                wait_for(lambda: len(answers) > ended + 40)
            finally: stop.set()
        assert gateway.workers[0].returncode == 0 and set(answers) == {200} and not errors
