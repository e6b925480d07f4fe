"""Whatever the OpenAPI document allows or forbids: every answer is one that it documents."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from kernel_artifacts import artifact
from registries import token_for

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.registry.book_access import SCOPES
from esper.registry.memory import MemoryRegistry
from esper.server.app import API, build_api, build_app

SAID_BY_NO_SCHEMA = ("POST /api/v1/kernels", "POST /api/v1/blueprints")
"""Bodies whose form is allowed, and that are refused where they are no artifact or blueprint."""


@pytest.fixture
def kept():
    """Return a registry with something in it, and the headers of who may do everything."""
    registry = MemoryRegistry()
    for number in range(3):
        registry.tag("mlp", f"t{number}", registry.put(artifact(number)))
    return registry, {"Authorization": f"Bearer {token_for(registry, *SCOPES)}"}


def fuzzed(app, headers, *, num_examples, path=""):
    """Ask for every operation below a path, half of the times in ways that the document forbids.

    Returns what was wrong, a line each, and how often was asked.
    """
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_asgi(f"{API}/openapi.json", app, headers=headers)
    wrong, num_asked = [], 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if not operation.path.startswith(path):
            continue
        for mode in schemathesis.GenerationMode:
            try:
                num_asked += ask(operation, mode, headers, num_examples // 2)
            except Unsatisfiable:  # it takes nothing that could be wrong
                continue
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - of a check or the server
                causes = getattr(error, "exceptions", (error,))
                wrong += [f"{operation.label} {mode.name}: {cause!r}" for cause in causes]
    return wrong, num_asked


def ask(operation, mode, headers, num_examples):
    """Ask for one operation in one mode, with every check of schemathesis; return how often."""
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    excluded = [positive_data_acceptance] if operation.label in SAID_BY_NO_SCHEMA else []
    num_asked = 0

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def each(case):
        nonlocal num_asked
        num_asked += 1
        is_report = isinstance(case.body, dict) and "artifact_id" in case.body
        if is_report and mode is GenerationMode.POSITIVE:  # one that is sent to its own address
            case.path_parameters["id"] = case.body["artifact_id"]
        if mode is GenerationMode.POSITIVE and "wait" in (case.query or {}):
            case.query["wait"] = 0  # nobody submits anything meanwhile
        sent = {} if has_wrong_headers(case) else headers
        case.call_and_validate(headers=sent, excluded_checks=excluded)

    each()
    return num_asked


def has_wrong_headers(case):
    """Say whether it is the headers of a request that are forbidden, the token's among them."""
    from schemathesis.core.parameters import ParameterLocation

    found = case.meta.components.get(ParameterLocation.HEADER)
    return found is not None and found.mode.is_negative


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_answer_is_a_documented_one(kept):
    """All checks of schemathesis, 50 requests for each operation that takes anything."""
    registry, headers = kept
    wrong, num_asked = fuzzed(build_app(registry), headers, num_examples=50)

    assert wrong == []
    assert num_asked > 1_000


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.timeout(7_200)
def test_every_answer_is_a_documented_one_5_000_times(kept):
    """The same with 5,000 requests for each operation."""
    registry, headers = kept
    wrong, num_asked = fuzzed(build_app(registry), headers, num_examples=5_000)

    assert wrong == []
    assert num_asked > 50_000


@pytest.mark.slow
def test_control_a_route_that_fails_for_some_is_found(kept):
    """A route that fails where a number is large, and answers with another form, is seen."""
    registry, headers = kept
    api = build_api(registry)

    @api.get("/api/v1/fragile")
    def fragile(number: int) -> int:
        return 1 // (number < 1 << 62)

    wrong, _ = fuzzed(api, headers, num_examples=60, path="/api/v1/fragile")
    assert any("fragile" in line for line in wrong)
