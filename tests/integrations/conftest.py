"""After every test PEFT's classes are what they were."""

import pytest

from tests.integrations.peft_case import peft_classes
from vblora_triton import unpatch_peft


@pytest.fixture(autouse=True)
def _peft_comes_back():
    before = [dict(vars(cls)) for cls in peft_classes()]
    yield
    unpatch_peft()
    assert [dict(vars(cls)) for cls in peft_classes()] == before
