"""What the tests of training share."""

import pytest

from fused_preact.train.data import Dataset, Images, digits


@pytest.fixture(scope="module")
def dataset():
    """The digits, fewer of them held out, to evaluate quickly."""
    whole = digits()
    return Dataset("digits", 10, whole.train, Images(whole.test.images[:20], whole.test.labels[:20]), flip=False)
