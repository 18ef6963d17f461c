"""What the description promises, held against requests that nobody wrote: Schemathesis on the document, hypothesis on the bodies."""
from __future__ import annotations

import json

import msgspec
import pytest
import schemathesis
from gateway_process import Gateway, running
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance

from recsys.serving.gateway import described
from recsys.serving.wire import BatchRequest, Event, EventsRequest, Item, ItemsRequest, RecommendationRequest
from recsys.settings import load

EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory):
    with running(tmp_path_factory.mktemp("fuzz") / "home") as gateway: yield gateway


@pytest.fixture(scope="module")
def api(gateway: Gateway): return schemathesis.openapi.from_dict(gateway.get("/openapi.json").json())


LISTED = [(o.method, o.path) for o, _ in described(load({}))]


def hold_to_its_word(gateway: Gateway, api: BaseSchema, method: str, path: str, examples: settings) -> None:
    @given(case=api[path][method].as_strategy())
    @examples
    def hold(case: schemathesis.Case) -> None:
        answer = case.call(base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.key}"})
        problem = answer.json() if answer.status_code == 422 else {}
        # a schema cannot say lowest <= highest, and takes 7.0 for an integer
        unsaid = problem.get("field", "").endswith("filters.price") or problem.get("rule") == "must be int, got float"
        case.validate_response(answer, excluded_checks=[positive_data_acceptance] if unsaid else [])
    hold()


@pytest.mark.parametrize(("method", "path"), LISTED)
def test_every_operation_does_what_its_description_says(gateway: Gateway, api: BaseSchema, method: str, path: str):
    hold_to_its_word(gateway, api, method, path, EXAMPLES)


@pytest.mark.long
@pytest.mark.parametrize(("method", "path"), [(m, p) for m, p in LISTED if p.startswith("/v1")])
def test_every_operation_does_so_a_thousand_times(gateway: Gateway, api: BaseSchema, method: str, path: str):
    hold_to_its_word(gateway, api, method, path, settings(EXAMPLES, max_examples=1000))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=12)
NEAR = {"/v1/events": EventsRequest, "/v1/items": ItemsRequest, "/v1/recommendations": RecommendationRequest, "/v1/recommendations/batch": BatchRequest}


def mangled(kind: type[msgspec.Struct]) -> st.SearchStrategy[bytes]:
    "Bodies that look like what is asked for, and are not quite."
    fields = st.sampled_from(list(kind.__struct_fields__))
    inside = {EventsRequest: Event, ItemsRequest: Item, BatchRequest: RecommendationRequest}.get(kind)
    records = st.lists(st.dictionaries(st.sampled_from(list(inside.__struct_fields__)) | st.text(max_size=8), JSON, max_size=8) | JSON, max_size=5) if inside else JSON
    objects = st.dictionaries(fields, records, max_size=4) | JSON
    texts = objects.map(lambda value: json.dumps(value).encode())
    return texts | st.binary(max_size=200) | st.tuples(texts, st.integers(0, 300), st.binary(max_size=3)).map(lambda t: t[0][:t[1]] + t[2] + t[0][t[1]:])


def survive(gateway: Gateway, examples: int) -> None:
    "Any body gets an answer that is no 5xx, from a worker that lives on."
    with gateway.client(headers={"Content-Type": "application/json"}) as client:
        @given(st.sampled_from(list(NEAR)).flatmap(lambda path: st.tuples(st.just(path), mangled(NEAR[path]))))
        @settings(EXAMPLES, max_examples=examples)
        def send(sent: tuple[str, bytes]) -> None:
            answer = client.request("PUT" if sent[0] == "/v1/items" else "POST", sent[0], content=sent[1])
            assert answer.status_code < 500, (sent, answer.text)
            if answer.status_code >= 400: assert answer.headers["content-type"] == "application/problem+json" and answer.json()["rule"]
        send()
    assert all(worker.poll() is None for worker in gateway.workers)


def test_mangled_bodies_get_answers(gateway: Gateway): survive(gateway, 300)


@pytest.mark.long
def test_a_hundred_thousand_mangled_bodies_get_answers(gateway: Gateway): survive(gateway, 100_000)
