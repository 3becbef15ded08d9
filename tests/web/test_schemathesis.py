"""Schemathesis on every operation: no 5xx, no undocumented status, answers as described, wrong data refused.

`positive_data_acceptance` is left out: a schema cannot say what an address is, or that one of html and text is needed.
Operations that are not built are no part of the document; tests/web/test_app.py asks each of them for its 501.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from nightmail.web.api.table import OPERATIONS
from nightmail.web.openapi import build_openapi
from tests.web.examples import make_belongings
from tests.web.serving import ADMIN_TOKEN, Org, Server

load_all_checks()
ADMIN_ONLY = ("/grant", "/clawback")
schema = schemathesis.openapi.from_dict(build_openapi(OPERATIONS, public_url=None))
BUILT = schema.exclude(path_regex=r"^/(healthz|readyz)$")


@pytest.fixture(scope="module")
def tenant(module_server: Server) -> Org:
    """A tenant that has one of everything."""
    org = module_server.make_org()
    make_belongings(module_server, org, org.live_key)
    return org


def check(case: schemathesis.Case[Any], server: Server, org: Org) -> None:
    server.app.state.api.failures._times.clear()  # the wrong admin tokens of other cases
    is_admins = case.path.startswith(("/orgs", "/runs", "/plans", "/purchases")) or case.path.endswith(ADMIN_ONLY)
    key = ADMIN_TOKEN if is_admins else org.live_key
    excluded: list[Any] = [positive_data_acceptance]
    if dict(case.headers or {}).get("x-batch-validation") == "permissive":
        # answers 200 and names what it refused
        excluded.append(negative_data_rejection)
    if case.method == "GET":
        # "Wrong" often means that Authorization is missing, and the line below puts it back
        excluded.append(negative_data_rejection)
    case.call_and_validate(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, excluded_checks=excluded)


@BUILT.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_operations(case: schemathesis.Case[Any], module_server: Server, tenant: Org) -> None:
    check(case, module_server, tenant)
