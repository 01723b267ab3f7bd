"""What several folders of tests share."""

import os
from pathlib import Path

import pytest

# Before torch is loaded: threads that spin while they wait starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real frames of public data sets, which may not be handed on and so lie beside the repository, not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data with real data sets is absent")
    return folder
