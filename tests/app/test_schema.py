"""The service against its own OpenAPI document: no request brings it down."""

from __future__ import annotations

from pathlib import Path

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from app.main import create_app
from workers.settings import Settings

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]


def test_no_request_is_an_internal_error(tmp_path: Path) -> None:
    app = create_app(Settings(data=tmp_path))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 10
    with TestClient(app) as client:
        for operation in operations:

            @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def attempt(case: schemathesis.Case) -> None:
                case.call_and_validate(session=client, checks=CHECKS)

            attempt()
