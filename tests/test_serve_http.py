# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The HTTP door before a pipeline of this process: every body is answered or refused in one line. Settings of a server."""

import base64
import json
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from helpers import tiny_pipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusers_msd.image_requests import ImageRequest, make_images
from diffusers_msd.serve_config import ServeConfig
from diffusers_msd.serve_http import ImagesIn, ImagesOut, http_app, png


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from serving import LocalService


KEY = "a key that nobody guesses"
FIELDS = sorted(ImagesIn.model_fields)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(2)


@pytest.fixture(scope="module")
def client(pipe):
    return TestClient(http_app(LocalService(pipe)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def closed(pipe):
    return TestClient(http_app(LocalService(pipe), api_key=KEY), raise_server_exceptions=False)


def test_images_are_those_of_the_pipeline(client, pipe):
    answer = client.post("/v1/images", json={"class_label": 3, "seed": 5, "num_images": 2})
    assert answer.status_code == 200
    made = ImagesOut.model_validate_json(answer.content)
    expected = make_images(pipe, ImageRequest(3, 5, 2))
    assert [base64.b64decode(image) for image in made.images] == [png(image) for image in expected.images]
    assert (made.seeds, made.student_indices) == ([5, 6], expected.student_indices)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([2**53, -1, 10**400, "\x00"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)
bodies = st.one_of(
    st.binary(max_size=200),
    anything.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), anything).map(lambda v: json.dumps(v).encode()),
    st.sampled_from([b"[" * 5000, b'{"class_label":' + b"9" * 5000 + b"}", b'{"class_label": 1, "seed": 1e400}']),
)
CONTENT_TYPES = ["application/json", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""]


@settings(max_examples=200, deadline=None)
@given(bodies, st.sampled_from(CONTENT_TYPES))
@example(b'{"class_label": NaN}', "application/json")
@example(b'{"class_label": 1, "\\ud800": 1}', "application/json")
@example(b'{"class_label": 1, "class_label": "../../etc/passwd"}', "application/json")
def test_any_body_is_answered_or_refused_in_one_line(client, body, content_type):
    answer = client.post("/v1/images", content=body, headers={"Content-Type": content_type})
    assert answer.status_code in (200, 400, 415, 422)
    if answer.status_code != 200:
        detail = answer.json()["detail"]
        assert isinstance(detail, str) and "\n" not in detail and len(detail) < 400


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "class_label: it is missing"),
        ({"class_label": "3"}, "class_label: Input should be a valid integer"),
        ({"class_label": 3.0}, "class_label: "),
        ({"class_label": True}, "class_label: "),
        ({"class_label": 9}, "class_label: a whole number in"),
        ({"class_label": 3, "num_images": 17}, "num_images: "),
        ({"class_label": 3, "steps": 4}, "body: a JSON object with some of prompt, class_label"),
        ([], "body: "),
        ("3", "body: "),
    ],
)
def test_a_refusal_begins_with_the_field(client, body, named):
    answer = client.post("/v1/images", json=body)
    assert answer.status_code == 422 and answer.json()["detail"].startswith(named)


def test_a_body_of_another_content_type_is_refused(client):
    for content_type, status in (
        ("text/plain", 415),
        ("", 415),
        (None, 415),
        ("application/jsonp", 415),
        ("Application/JSON; charset=utf-8", 200),
    ):
        headers = {} if content_type is None else {"Content-Type": content_type}
        answer = client.post("/v1/images", content=b'{"class_label": 3}', headers=headers)
        assert answer.status_code == status, content_type
        assert status == 200 or answer.json()["detail"] == "content-type: application/json expected"


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_large_body_is_refused(client, in_pieces):
    content = b" " * 20_000
    pieces = (content[i : i + 1000] for i in range(0, len(content), 1000))
    answer = client.post(
        "/v1/images", content=pieces if in_pieces else content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


def test_other_paths_and_methods_are_refused(client):
    assert client.get("/v1/images").status_code == 405
    assert client.post("/v1/../etc/passwd").status_code == 404


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY[:-1]}", "Bearer é"]
)
def test_without_the_key_nothing_is_made(closed, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = closed.post("/v1/images", json={"class_label": 3}, headers=headers)
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert KEY not in answer.text


def test_with_the_key_images_are_made(closed):
    headers = {"Authorization": f"Bearer {KEY}"}
    assert closed.post("/v1/images", json={"class_label": 3}, headers=headers).status_code == 200
    assert closed.get("/healthz").status_code == closed.get("/readyz").status_code == 200


def test_readiness_is_that_of_every_student(pipe):
    service = LocalService(pipe)
    client = TestClient(http_app(service))
    assert client.get("/readyz").json() == {"ready": True, "students": {"0": 1, "1": 1}}
    for replicas in ({0: 2, 1: 0}, {}):
        service.replicas = replicas
        assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


def test_the_schema_describes_the_door(closed):
    schema = closed.get("/openapi.json").json()
    post = schema["paths"]["/v1/images"]["post"]
    assert set(post["responses"]) == {"200", "401", "413", "415", "422", "429", "503", "504"}
    assert post["security"] == [{"HTTPBearer": []}]
    body = schema["components"]["schemas"]["ImagesIn"]
    assert set(body["properties"]) == set(FIELDS) and body["additionalProperties"] is False
    assert {"/healthz", "/readyz"} < set(schema["paths"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"replicas": []}, "replicas: "),
        ({"replicas": [0]}, "replicas: "),
        ({"max_batch_size": 0}, "max_batch_size: "),
        ({"max_queue": 0}, "max_queue: "),
        ({"deadline": 0}, "deadline: "),
        ({"deadline": float("nan")}, "deadline: "),
        ({"retries": -1}, "retries: "),
        ({"num_gpus": -1}, "num_gpus: "),
        ({"dtype": "int8"}, "dtype: one of float32, float16, bfloat16"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, named):
    with pytest.raises(ValueError) as error:
        ServeConfig(**settings)
    assert str(error.value).startswith(named)


def test_replicas_are_given_for_all_students_or_for_each():
    assert ServeConfig(replicas=[2]).replicas_of([0, 2]) == {0: (2, 2), 2: (2, 2)}
    assert ServeConfig(replicas=[1, 3], max_replicas=[4]).replicas_of([0, 2]) == {0: (1, 4), 2: (3, 4)}
    assert ServeConfig(replicas=[1, 3], max_replicas=[4], num_cpus=0.3).cpus([0, 2]) == 4
    for wrong, named in (
        ({"replicas": [1, 2, 3]}, "replicas: "),
        ({"replicas": [5], "max_replicas": [4]}, "max_repl"),
    ):
        with pytest.raises(ValueError, match=named):
            ServeConfig(**wrong).replicas_of([0, 2])


def test_only_students_that_may_grow_scale_by_themselves():
    config = ServeConfig(max_batch_size=4)
    assert config.student_options(2, 2)["num_replicas"] == 2
    scaling = config.student_options(1, 3)["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 3, 4)
