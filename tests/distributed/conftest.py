"""Four gloo ranks for all tests of this folder; smaller groups are their first ranks."""

from collections.abc import Iterator

import pytest
from workers import Workers


@pytest.fixture(scope="session")
def workers(tmp_path_factory) -> Iterator[Workers]:
    workers = Workers(4, tmp_path_factory.mktemp("ranks"))
    yield workers
    workers.stop()
