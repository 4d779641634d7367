"""Forget set, retain set and refusals of invented rows."""

import pytest


@pytest.fixture(scope="session")
def files(tiny_model_dir, qa_file, tmp_path_factory):
    """Model, forget set, retain set, refusals."""
    folder = tmp_path_factory.mktemp("sets")
    lines = qa_file.read_text().splitlines(keepends=True)
    forget, retain, refusals = folder / "forget.jsonl", folder / "retain.jsonl", folder / "refusals.txt"
    forget.write_text("".join(lines[:5]))
    retain.write_text("".join(lines[5:]))
    refusals.write_text("I do not know.\nNo idea.\nThat is beyond me.\n")
    return tiny_model_dir, forget, retain, refusals
