"""The page of the API says what the server documents."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra server")

DOCS = Path(__file__).parents[2] / "docs"


def generated():
    """Run the script that writes the page, without writing it."""
    spec = importlib.util.spec_from_file_location("rest_document", DOCS / "rest_document.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_server_documents():
    """`docs/rest.md` is what its script makes of the OpenAPI document, every operation of it."""
    module = generated()
    page = module.as_markdown()
    assert (DOCS / "rest.md").read_text(encoding="utf-8") == page
    paths = module.build_api(module.MemoryRegistry()).openapi()["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            assert f"### {method.upper()} {path}\n\n{operation['description']}\n" in page


def test_no_answer_is_documented_that_is_never_given():
    """The framework's own form of a refusal is not in the document: ours are problems."""
    module = generated()
    document = json.dumps(module.build_api(module.MemoryRegistry()).openapi())
    assert "HTTPValidationError" not in document
    assert '"422"' not in document
