"""Published models, fetched once into the user's cache folder."""

import pytest

from pykv.llm import models


@pytest.fixture(scope="session")
def model_path():
    """model_path("smollm2-135m") is the model's GGUF file; a test that uses it is marked model."""
    return models.fetch
