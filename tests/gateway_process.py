"""Real gateway processes for tests: a home with the tiny shop's champion, and workers that share one listening socket."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from recsys.models import covisit, popular, release
from recsys.models.bundle import promote
from recsys.prep.clean import interactions
from recsys.prep.vocab import Vocab
from recsys.schema import ITEM_ID
from recsys.serving.auth import Keys
from recsys.settings import Home
from recsys.synth import DAY, T0, shop

WORKER = """
import sys
from pathlib import Path
from recsys.serving.gateway import serve
from recsys.settings import Home, load
from recsys.telemetry import configure
home = Home.open(sys.argv[1])
configure("gateway", file=home.logs / "gateway.log")
serve(home, load(home=home.path), host="127.0.0.1", port=0, fd=int(sys.argv[2]))
"""


def bundle(home: Home, *, created: int = T0 + 7 * DAY, which: tuple = (covisit, popular)) -> str:
    "Write a bundle of the tiny shop; another `created` is another bundle. Its id."
    world = shop()
    vocab, rows = Vocab.build(world.items[ITEM_ID]), interactions(world.events.lazy()).collect()
    models = [m.fit(rows, asof=T0 + 7 * DAY, vocab=vocab) for m in which]
    about = {"created": created, "data": {"asof": T0 + 7 * DAY}, "metrics": {}, "settings": {}}
    return release.write_bundle(models, world.items, registry=home.registry, about=about).name


def champion(home: Home, **kw) -> str:
    "Write and promote a bundle; its id."
    id = bundle(home, **kw)
    promote(home.registry, id, reason="test")
    return id


@dataclass
class Gateway:
    "Workers that run, and a client with a key for events and recommendations."

    home: Home
    url: str
    key: str
    listener: socket.socket
    environ: dict[str, str]
    workers: list[subprocess.Popen] = field(default_factory=list)
    program: str = WORKER

    def start(self) -> subprocess.Popen:
        "One more worker on the shared socket."
        fd = self.listener.fileno()
        self.workers.append(subprocess.Popen([sys.executable, "-c", self.program, str(self.home.path), str(fd)], pass_fds=[fd], env=self.environ))
        return self.workers[-1]

    def client(self, **kw) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} | kw.pop("headers", {})
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=False, **kw)  # no TLS here: do not load certificates

    def post(self, path: str, body: object, **kw) -> httpx.Response:
        "One request on a connection of its own, so that any worker may get it."
        with self.client() as client: return client.post(path, json=body, **kw)

    def recommend(self, **body) -> httpx.Response: return self.post("/v1/recommendations", body)
    def events(self, *events: dict) -> httpx.Response: return self.post("/v1/events", {"events": list(events)})

    def get(self, path: str) -> httpx.Response:
        with httpx.Client(base_url=self.url, timeout=60, verify=False) as client: return client.get(path)

    def log(self) -> list[dict]:
        "Every line of the log so far; each must be JSON."
        return [json.loads(line) for line in (self.home.logs / "gateway.log").read_text().splitlines()]

    def measured(self, name: str) -> float:
        "The sum of a metric over its labels, of all workers."
        return sum(float(line.rpartition(" ")[2]) for line in self.get("/metrics").text.splitlines() if line.partition("{")[0].partition(" ")[0] == name)


def wait_for(condition, *, seconds: float = 120.0) -> None:
    "Until the condition holds; the limit is for a machine that is busy with other things."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition(): return
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {condition}")


def alive(gateway: Gateway, path: str = "/healthz") -> bool:
    try: return gateway.get(path).status_code == 200
    except httpx.TransportError: return False


@contextmanager
def running(path: Path, *, workers: int = 1, ready: bool = True, host: str = "127.0.0.1", program: str = WORKER, **settings: str) -> Iterator[Gateway]:
    "A gateway in a new home; `settings` are RECSYS_ variables. It is stopped, and must stop cleanly unless it was killed."
    home = Home.open(path)
    if ready: champion(home)
    keys = Keys(home.keys)
    key = keys.create(["events:write", "recs:read", "items:write"], name="test")
    keys.close()
    (home.run / "metrics").mkdir(exist_ok=True)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RECSYS_")} | {"RECSYS_GATEWAY_MAX_WAIT_MS": "60000"} | settings | {
        "PROMETHEUS_MULTIPROC_DIR": str(home.run / "metrics"), "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    with socket.create_server((host, 0), backlog=512) as listener:
        scheme = "https" if "RECSYS_GATEWAY_TLS_CERT" in settings else "http"
        gateway = Gateway(home, f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", key, listener, environ, program=program)
        try:
            for _ in range(workers): gateway.start()
            wait_for(lambda: alive(gateway))
            wait_for(lambda: sum(line["event"] == "serving" for line in gateway.log()) >= workers)
            yield gateway
        finally:
            for worker in gateway.workers:
                if worker.poll() is None: worker.send_signal(signal.SIGTERM)
            ends = [worker.wait(timeout=120) for worker in gateway.workers]
    assert set(ends) <= {0, -signal.SIGKILL}, ends
