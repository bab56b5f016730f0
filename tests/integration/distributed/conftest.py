import pytest

from tests.helpers.models import save_tiny
from tests.integration.distributed.runs import run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def undisturbed(folder, tmp_path_factory):
    """(strategy, lora) -> results of each rank, made once."""
    made = {}

    def get(strategy, *, prune_only):
        key = strategy, prune_only
        if key not in made:
            made[key] = run(folder, tmp_path_factory.mktemp("undisturbed"), strategy, prune_only=prune_only)
        return made[key]

    return get
