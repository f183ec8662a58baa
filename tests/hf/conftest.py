import pytest
from hf_models import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param
