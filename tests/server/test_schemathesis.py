"""What our OpenAPI document allows and forbids, generated at random, gets an answer that the document has."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("msgspec", reason="msgspec of lowbit[serve] is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from schemathesis import GenerationMode, checks  # noqa: E402

from lowbit.server.openapi import READS, REQUESTS, document  # noqa: E402

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
# Nothing is inherited from a failure here before: each run is new, and bounded.
BOUNDED = settings(
    max_examples=15,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema():
    return schemathesis.openapi.from_dict(document("0"))


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("mode", [GenerationMode.NEGATIVE, GenerationMode.POSITIVE], ids=["bad", "good"])
def test_posts(server, schema, path, mode):
    """Bad requests are refused, good ones are answered or refused for a reason a schema cannot hold."""
    operation = schema[path]["POST"]
    wanted = [*CHECKS]
    if mode is GenerationMode.NEGATIVE:
        wanted.append(checks.negative_data_rejection)

    @given(case=operation.as_strategy(generation_mode=mode))
    @BOUNDED
    def ask(case):
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if case.body.get(name) is not None:
                    case.body[name] = 2
        response = case.call(base_url=server.url, timeout=60)
        case.validate_response(response, checks=wanted)

    ask()


@pytest.mark.parametrize("path", READS)
def test_gets(server, schema, path):
    operation = schema[path]["GET"]

    @given(case=operation.as_strategy())
    @settings(BOUNDED, max_examples=2)
    def ask(case):
        response = case.call(base_url=server.url, timeout=60)
        case.validate_response(response, checks=CHECKS)

    ask()
