"""Tensors of these tests are so small that a second thread only waits."""

import pytest

from tests.runtime.models import one_thread


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    with one_thread():
        yield
