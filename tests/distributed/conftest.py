"""The fixture through which a test gets the run that it judges."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Variant, run_variants


_finished: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}


@pytest.fixture
def results(
    variant: Variant, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """
    What each rank answered.

    All selected variants of a file with the same number of processes run together, when the first is asked for.
    """
    file, key = request.path, (str(request.path), variant.world)
    if key not in _finished:
        params = (
            item.callspec.params.get("variant")
            for item in request.session.items
            if item.path == file and hasattr(item, "callspec")
        )
        specs = {v.id: v.spec() for v in params if v is not None and v.world == variant.world}
        folder = tmp_path_factory.mktemp(f"{file.stem}-{variant.world}")
        _finished[key] = run_variants(list(specs.values()), variant.world, folder)
    return _finished[key][variant.id]
