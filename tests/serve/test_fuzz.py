"""Requests that are made up from the server's own description of its API."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from sinkattn.serve.limits import Limits

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.slow
def test_made_up_requests(make_server, run_server):
    """Each gets an answer that the description has, none an error of the server; nothing is left behind."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
    statuses = set()
    with run_server(make_server(limits=Limits(max_tokens=8))) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()

            @given(case=operation.as_strategy())
            @settings(
                max_examples=25,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=[*HealthCheck],
            )
            def is_answered(case):
                if isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = "tiny"
                response = case.call(base_url=running.url)
                statuses.add(response.status_code)
                case.validate_response(response, checks=checks)

            is_answered()
        running.wait_until(lambda: running.server.num_at_work == 0)
        sessions = running.server.sessions
        assert not any(session.is_used for session in sessions.of(""))
        assert len(running.server.pool) == len(sessions)
    assert {200, 400, 404} <= statuses
