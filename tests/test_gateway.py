"""The HTTP API (v1) as a shop's developer meets it: real worker processes on one socket, real requests."""
from __future__ import annotations

import concurrent.futures
import inspect
import re
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from gateway_process import Gateway, bundle, champion, running, wait_for

from recsys.lake.eventlog import SQLiteEventLog
from recsys.lake.vault import Vault
from recsys.models.bundle import promote
from recsys.schema import EVENT_TYPES
from recsys.serving.auth import Keys
from recsys.serving.client import Client, Refusal
from recsys.serving.live import Live
from recsys.serving.openapi import Operation
from recsys.serving.problems import PROBLEMS


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory):
    with running(tmp_path_factory.mktemp("gateway") / "home", workers=2) as gateway: yield gateway


def event(event_id: str, user_id: str, item_id: str = "mug", type: str = "view", **more) -> dict:
    return {"event_id": event_id, "user_id": user_id, "item_id": item_id, "type": type, **more}


def shown(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [slot["item_id"] for slot in answer.json()["items"]]


def test_a_recommendation_has_the_shape_of_the_contract(gateway: Gateway):
    answer = gateway.recommend(user_id="shape", items=["mug"], k=4, surface="home", context={"device": "phone"}).json()
    assert set(answer) == {"recommendation_id", "items", "tier", "age_ms", "bundle"}
    assert answer["tier"] == "retrieval" and answer["age_ms"] == 0 and len(answer["items"]) == 4
    for slot in answer["items"]:
        assert set(slot) == {"item_id", "score", "source", "reason", "propensity"}
        assert slot["propensity"] == 1.0 and slot["source"] in ("covisit", "new", "popular") and slot["reason"]
    assert answer["items"][0]["reason"] == "because you viewed Mug"


def test_a_click_changes_the_very_next_slate_whichever_worker_answers(gateway: Gateway):
    for n in range(30):
        user = f"clicker-{n}"
        before = shown(gateway.recommend(user_id=user, k=9))
        taken = gateway.events(event(f"click-{n}", user, before[n % 3]))
        assert taken.status_code == 202 and taken.json() == {"accepted": 1, "duplicates": 0, "rejected": []}
        after = gateway.recommend(user_id=user, k=9)
        assert before[n % 3] not in shown(after)
        assert any(slot["reason"].startswith("because you viewed") for slot in after.json()["items"])
    assert len({line["pid"] for line in gateway.log() if line["event"] == "serving"}) == 2


def test_a_retry_is_counted_once(gateway: Gateway):
    again = event("twice", "retry")
    first, second = gateway.events(again, again), gateway.events(again)
    assert (first.json()["accepted"], first.json()["duplicates"]) == (1, 1) and second.json()["duplicates"] == 1


def test_a_bad_event_costs_itself_only(gateway: Gateway):
    bad = [event("b1", "bad", type="click"), event("b2", "bad", price="cheap"), event("b3", "bad", colour="red"), 7, event("b4", "bad", ts=-1),
           event("b5", "bad", context={"email": "a@b"}), event("b6", "bad", known_ts=1), {"event_id": "b7"}, event("b8", "bad", quantity=0)]
    answer = gateway.events(event("g1", "bad"), *bad, event("g2", "bad"))
    assert answer.status_code == 202 and answer.json()["accepted"] == 2
    rejected = answer.json()["rejected"]
    assert [r["index"] for r in rejected] == list(range(1, 10)) and all(r["rule"] and r["remedy"] for r in rejected)
    assert [r["field"] for r in rejected] == ["type", "price", "colour", "event", "ts", "context.email", "known_ts", "user_id", "quantity"]


def test_persons_are_stored_as_pseudonyms_and_the_platform_sets_its_times(gateway: Gateway):
    began = time.time_ns() // 1_000_000
    assert gateway.events(event("p1", "ann@example.org", session_id="secret-session", context={"device": "phone"})).status_code == 202
    log = SQLiteEventLog(gateway.home.eventlog)
    found = next(e for _, e in log.read("events", after=0, limit=10_000) if e["event_id"] == "p1")
    log.close()
    vault = Vault.open(gateway.home.keys)
    assert found["user_id"] == vault.pseudonym("ann@example.org") and found["session_id"] == vault.pseudonym("secret-session", kind="session")
    assert began <= found["ts"] == found["known_ts"] <= began + 60_000 and found["context"] == '{"device":"phone"}'
    stored = b"".join(p.read_bytes() for p in gateway.home.path.rglob("*") if p.is_file())
    assert b"ann@example.org" not in stored and b"secret-session" not in stored


def test_every_answer_is_recorded_before_it_is_sent(gateway: Gateway):
    gateway.events(event("r1", "recorded", "spade"))
    asked = {"user_id": "recorded", "k": 3, "surface": "basket", "exclude": ["rake"], "filters": {"categories": ["garden"]}}
    answer = gateway.recommend(**asked).json()
    log = SQLiteEventLog(gateway.home.eventlog)
    kept, user = log.impression(answer["recommendation_id"]), Vault.open(gateway.home.keys).pseudonym("recorded")
    history = log.history(user)
    log.close()
    assert kept["user_id"] == user and kept["user_seq"] == history.user_seq > 0 and kept["surface"] == "basket"
    assert [(s["item_id"], s["score"], s["rank"], s["propensity"]) for s in kept["slots"]] == [
        (s["item_id"], s["score"], n, 1.0) for n, s in enumerate(answer["items"], 1)]
    assert kept["bundle"] == answer["bundle"] and kept["tier"] == "retrieval" and kept["latency_us"] > 0 and '"exclude":["rake"]' in kept["features"]


def test_awkward_requests_get_answers(gateway: Gateway):
    everything = shown(gateway.recommend(k=200))
    assert len(everything) == len(set(everything)) == 9
    assert shown(gateway.recommend(items=["no such item", "mug", "mug"])) == shown(gateway.recommend(items=["mug"]))
    assert shown(gateway.recommend(exclude=everything)) == []
    assert shown(gateway.recommend(exclude=[f"x{n}" for n in range(10_000)], k=200)) == everything
    assert set(shown(gateway.recommend(k=200, filters={"categories": ["home"], "price": [5, None], "in_stock": True}))) == {"pot", "kettle", "lamp"}
    assert shown(gateway.recommend(filters={"items": ["lamp", "nothing"]})) == ["lamp"] and shown(gateway.recommend(filters={"items": []})) == []


@pytest.mark.parametrize(("body", "field"), [
    ({"k": "ten"}, "k"), ({"k": 0}, "k"), ({"k": 201}, "k"), ({"k": 1.5}, "k"), ({"k": None}, "k"), ({"k": 10**30}, "k"), ({"user_id": 7}, "user_id"),
    ({"user_id": ""}, "user_id"), ({"user_id": "a\0"}, "user_id"), ({"user_id": "x" * 257}, "user_id"), ({"items": "mug"}, "items"), ({"items": [None]}, "items[0]"),
    ({"exlude": []}, "exlude"), ({"exclude": ["x"] * 10_001}, "exclude"), ({"filters": {"price": [9, 1]}}, "filters.price"), ({"filters": {"price": [1]}}, "filters.price"),
    ({"filters": {"stock": True}}, "filters.stock"), ({"filters": {"in_stock": 1}}, "filters.in_stock"), ({"context": {"email": "a"}}, "context.email"),
    ({"context": {"device": 1}}, "context[...]"), ({"surface": "\n"}, "surface"), ([], "body"), ("k", "body")])
def test_a_request_that_breaks_a_rule_is_told_which(gateway: Gateway, body: object, field: str):
    answer = gateway.post("/v1/recommendations", body)
    problem = answer.json()
    assert answer.status_code == 422 == problem["status"] and answer.headers["content-type"] == "application/problem+json"
    assert problem["field"] == field and problem["rule"] and problem["remedy"] and problem["title"] and problem["type"] == "/docs#invalid"
    assert problem["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/events", "/v1/recommendations"])
def test_what_is_no_json_is_a_400(gateway: Gateway, path: str):
    name = "events" if path == "/v1/events" else "items"
    with gateway.client() as client:
        for body in (b"", b"{", b"\xff\xfe", b'{"%s": ["a"', b'{"%s": [NaN]}', b'{"%s": []} x', b'{"%s": ["\xff"]}', b'{"%s": ["\\ud800"]}'):
            body = body.replace(b"%s", name.encode())
            answer = client.post(path, content=body)
            assert answer.status_code == 400 and answer.json()["type"] == "/docs#bad-json", (body[:20], answer.text)
        assert client.post(path, content=b'{"%s": ' % name.encode() + b"[" * 100_000).status_code in (400, 422)  # nested without end


def test_limits(gateway: Gateway):
    with gateway.client() as client:
        assert client.post("/v1/events", content=b" " * 2_000_000).status_code == 413
        assert client.post("/v1/events", content=(b" " * 100_000 for _ in range(20))).status_code == 413  # chunked: no length is declared
        assert client.post("/v1/events", content=b"{}", headers={"Content-Encoding": "gzip"}).status_code == 415
        many = client.post("/v1/events", json={"events": [event(f"m{n}", "many") for n in range(1001)]})
        assert many.status_code == 422 and many.json()["field"] == "events"
        assert client.post("/v1/recommendations", json={"k": 3}).status_code == 200  # the connection still works


def test_addresses_methods_and_keys(gateway: Gateway):
    keys = Keys(gateway.home.keys)
    reader = keys.create(["recs:read"], name="reader")
    with httpx.Client(base_url=gateway.url) as client:
        assert client.get("/v2").status_code == 404 and client.get("/v1/events/").status_code == 404
        wrong = client.get("/v1/events")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and wrong.json()["rule"] == "takes POST"
        for sent in ({}, {"Authorization": ""}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer x y"}, {"Authorization": f"Bearer {reader[:-1]}~"},
                     {"Authorization": reader}, {"Authorization": b"Bearer \xff"}):
            answer = client.post("/v1/recommendations", json={}, headers=sent)
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Bearer") and answer.json()["remedy"], sent
        assert client.post("/v1/recommendations", json={}, headers={"Authorization": f"bearer {reader}"}).status_code == 200
        refused = client.post("/v1/events", json={"events": []}, headers={"Authorization": f"Bearer {reader}"})
        assert refused.status_code == 403 and "events:write" in refused.json()["rule"]
    keys.close()


def test_a_key_works_at_once_and_ends_at_once_in_every_worker(gateway: Gateway):
    keys = Keys(gateway.home.keys)
    for n in range(20):
        key = keys.create(["recs:read"], name=f"short-lived {n}")
        ask = [gateway.post("/v1/recommendations", {}, headers={"Authorization": f"Bearer {key}"}).status_code for _ in range(3)]
        keys.revoke(key)
        ask += [gateway.post("/v1/recommendations", {}, headers={"Authorization": f"Bearer {key}"}).status_code for _ in range(3)]
        assert ask == [200, 200, 200, 401, 401, 401]
    keys.close()


def test_request_ids_go_in_and_come_out(gateway: Gateway):
    sent = gateway.post("/v1/recommendations", {}, headers={"X-Request-ID": "shop-17"})
    assert sent.headers["x-request-id"] == "shop-17"
    for odd in ("a b", "x" * 65, "ann@example.org", ""):
        assert re.fullmatch("[0-9a-f]{16}", gateway.post("/v1/recommendations", {}, headers={"X-Request-ID": odd}).headers["x-request-id"])
    wait_for(lambda: any(line.get("request_id") == "shop-17" and line["event"] == "request" for line in gateway.log()))


def test_logs_hold_templates_and_no_raw_ids(gateway: Gateway):
    gateway.events(event("planted-event", "planted-user", session_id="planted-session"))
    gateway.recommend(user_id="planted-user", exclude=["planted-item"])
    gateway.recommend(user_id="planted-user", k="planted-value")
    gateway.post("/planted-path?user=planted-query", {}, headers={"X-Request-ID": "last-of-four"})
    wait_for(lambda: any(line.get("request_id") == "last-of-four" for line in gateway.log()))
    raw = (gateway.home.logs / "gateway.log").read_text()
    assert "planted" not in raw and gateway.key not in raw and gateway.key.split("_", 2)[2] not in raw
    access = [line for line in gateway.log() if line["event"] == "request"]
    assert {"/v1/events", "/v1/recommendations", "other"} <= {line["route"] for line in access}
    assert all(line["component"] == "gateway" and line["request_id"] and line["status"] and line["ms"] >= 0 for line in access)


def test_metrics_have_names_that_others_rely_on(gateway: Gateway):
    gateway.events(event("metric", "metric"), event("metric", "metric"), 7)
    gateway.recommend(user_id="metric")
    wait_for(lambda: gateway.measured("recsys_recommendations_total") > 0)
    text = gateway.get("/metrics").text
    for name in ("recsys_http_requests_total", "recsys_http_request_seconds_bucket", "recsys_http_requests_under_way", "recsys_events_total", "recsys_events_rejected_total",
                 "recsys_recommendations_total", "recsys_recommended_items_total", "recsys_bundle_info", "recsys_bundle_asof_seconds", "recsys_bundle_swaps_total",
                 "recsys_eventlog_rows"):
        assert re.search(rf"^{name}[{{ ]", text, re.M), name
    for label in ('outcome="accepted"', 'outcome="duplicate"', 'outcome="rejected"', 'tier="retrieval"', 'route="/v1/events"', 'stream="events"'): assert label in text
    before = gateway.measured("recsys_recommendations_total")
    for _ in range(10): gateway.recommend(k=1)
    wait_for(lambda: gateway.measured("recsys_recommendations_total") >= before + 10)  # of all workers together


def test_the_description_is_complete_and_says_what_happens(gateway: Gateway):
    described = gateway.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1") and set(described["paths"]) == {
        "/v1/events", "/v1/recommendations", "/v1/recommendations/batch", "/v1/recommendations/{recommendation_id}", "/v1/items/{item_id}/similar", "/v1/trending", "/v1/items", "/healthz", "/readyz", "/metrics", "/openapi.json",
        "/docs"}
    schemas = described["components"]["schemas"]
    assert schemas["Event"]["properties"]["type"]["enum"] == sorted(EVENT_TYPES) and schemas["RecommendationRequest"]["properties"]["k"]["maximum"] == 200
    assert schemas["RecommendationRequest"]["additionalProperties"] is False
    references = re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', gateway.get("/openapi.json").text)
    assert set(references) <= set(schemas)
    del described["paths"]["/v1/recommendations/{recommendation_id}"]  # for administrators: test_gateway_doors.py
    for template, methods in described["paths"].items():
        path = template.replace("{item_id}", "mug")
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
            with gateway.client() as client: answer = client.request(method.upper(), path, json=body)
            said = operation["responses"][str(answer.status_code)]
            assert answer.is_success and answer.headers["content-type"].split(";")[0] in said["content"], path
            with httpx.Client(base_url=gateway.url) as client: assert (client.request(method.upper(), path, json=body).status_code == 401) == bool(operation["security"])


def test_the_page_needs_nothing_from_elsewhere(gateway: Gateway):
    page = gateway.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", page.text) and "<script" not in page.text
    assert {f'id="{a}"' for a in re.findall(r'href="#([^"]+)"', page.text)} <= set(re.findall(r'id="[^"]+"', page.text))
    assert all(f'id="{name}"' in page.text for name in PROBLEMS)  # where a problem's `type` points


def test_the_python_client(gateway: Gateway):
    with Client(gateway.url, gateway.key) as client:
        assert client.send_events([{"user_id": "py", "item_id": "mug", "type": "view"}]).accepted == 1
        answer = client.recommend("py", k=3)
        assert len(answer.items) == 3 and answer.items[0].reason == "because you viewed Mug"
        with pytest.raises(Refusal, match="k must be int from 1 to 200"): client.recommend("py", k=500)
    with Client(gateway.url, "rk_0", retries=0) as client, pytest.raises(Refusal, match="Authorization"): client.recommend()


def test_half_a_request_and_noise_leave_the_gateway_standing(gateway: Gateway):
    where = ("127.0.0.1", gateway.listener.getsockname()[1])
    for noise in (b"", b"\0" * 1000, b"GET", b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000,
                  b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"POST /v1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"):
        with socket.create_connection(where) as connection: connection.sendall(noise)
    assert shown(gateway.recommend(k=3)) and all(worker.poll() is None for worker in gateway.workers)


def test_a_worker_that_is_killed_loses_no_acknowledged_event(gateway: Gateway):
    acknowledged: list[str] = []

    def send(n: int) -> None:
        with gateway.client() as client:
            for m in range(200):
                try: answer = client.post("/v1/events", json={"events": [event(f"kill-{n}-{m}", f"killer-{n}")]})
                except httpx.TransportError: continue
                if answer.status_code == 202: acknowledged.append(f"kill-{n}-{m}")
    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    for t in threads: t.start()
    wait_for(lambda: len(acknowledged) > 100)
    gateway.workers[0].send_signal(signal.SIGKILL)
    gateway.start()  # as the supervisor would
    for t in threads: t.join()
    log = SQLiteEventLog(gateway.home.eventlog)
    kept = [e["event_id"] for _, e in log.read("events", after=0, limit=100_000)]
    log.close()
    assert len(acknowledged) > 100 and set(acknowledged) <= set(kept) and len(kept) == len(set(kept))


def test_a_new_champion_is_served_without_a_failed_request(gateway: Gateway):
    stop, answers = threading.Event(), []
    assert inspect.signature(Live.follow).parameters["every"].default <= 0.5  # a worker looks more than once a second

    def ask() -> None:
        with gateway.client() as client:
            while not stop.is_set():
                answer = client.post("/v1/recommendations", json={"items": ["mug"], "k": 5})
                answers.append((answer.status_code, answer.json().get("bundle")))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            for n in range(3):
                new = bundle(gateway.home, created=1_800_000_000_000 + n)
                promote(gateway.home.registry, new, reason="swap")
                wait_for(lambda new=new: {b for _, b in answers[-30:]} == {new}, seconds=60)
        finally: stop.set()
        for a in asking: a.result()
    assert {status for status, _ in answers} == {200}


def test_sigterm_finishes_what_was_begun(tmp_path: Path):
    with running(tmp_path / "home") as gateway:
        worker, statuses = gateway.workers[0], []

        def send(n: int) -> None:
            try: statuses.append(gateway.events(*[event(f"drain-{n}-{m}", "drain") for m in range(200)]).status_code)
            except httpx.ConnectError: statuses.append(0)
            except httpx.TransportError as e: statuses.append(str(e))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            for n in range(20): pool.submit(send, n)
            wait_for(lambda: len(statuses) > 3)
            worker.send_signal(signal.SIGTERM)
            gateway.listener.close()
            assert worker.wait(timeout=120) == 0
        log = SQLiteEventLog(gateway.home.eventlog)
        assert log.depth("events", after=0) >= 200 * sum(s == 202 for s in statuses) > 0
        log.close()


def test_without_a_model_it_says_so_and_takes_one_when_it_comes(tmp_path: Path):
    with running(tmp_path / "home", ready=False) as gateway:
        assert gateway.get("/healthz").json() == {"status": "ok"}
        for answer in (gateway.get("/readyz"), gateway.recommend(user_id="early")):
            assert answer.status_code == 503 and answer.headers["retry-after"] and "retrain" in answer.json()["remedy"]
        assert gateway.events(event("early", "early")).status_code == 202  # events do not wait for a model
        id = champion(gateway.home)
        wait_for(lambda: gateway.get("/readyz").status_code == 200, seconds=60)
        assert gateway.get("/readyz").json() == {"status": "ready", "bundle": id} and "mug" not in shown(gateway.recommend(user_id="early"))


def test_settings_reach_the_gateway(tmp_path: Path):
    with running(tmp_path / "home", RECSYS_POLICY_HIDE_SEEN="never", RECSYS_GATEWAY_MAX_K="3", RECSYS_GATEWAY_MAX_BODY_BYTES="2000", RECSYS_EVENTS_CONTEXT="store") as gateway:
        assert gateway.events(event("e1", "ann", "mug", context={"store": "berlin"})).json()["accepted"] == 1
        assert "mug" in shown(gateway.recommend(user_id="ann", k=3, filters={"items": ["mug"]})) and gateway.recommend(k=4).status_code == 422
        assert gateway.events(*[event(f"x{n}", "ann") for n in range(100)]).status_code == 413
        assert gateway.get("/openapi.json").json()["components"]["schemas"]["RecommendationRequest"]["properties"]["k"]["maximum"] == 3


def test_every_keyed_operation_names_its_problems():
    operation = Operation("POST", "/x", "x", {200: dict}, scope="admin", body=dict, problems=("busy",))
    assert operation.all_problems == sorted(operation.all_problems, key=list(PROBLEMS).index) and {"no-key", "bad-json", "busy"} <= set(operation.all_problems)
