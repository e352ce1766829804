import pytest

from detr_fast.data import make_shapes_dataset


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return make_shapes_dataset(tmp_path_factory.mktemp("shapes"), num_train=12, num_val=5, seed=3)
