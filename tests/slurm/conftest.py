"""One cluster for all tests of this folder, or a loud word on what it lacks."""

import shutil
import tempfile
from pathlib import Path

import pytest

from slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster():
    """Two nodes; skips where the packages are not there."""
    lacks = missing()
    if lacks:
        pytest.skip(
            f"NO SLURM TESTS WERE RUN: this machine lacks {', '.join(lacks)}; "
            f"apt-get install slurmctld slurmd slurm-client munge, "
            f"pip install 'dori_lightning[slurm]'"
        )
    # a short name: the path of munge's socket must not be long
    folder = Path(tempfile.mkdtemp(prefix="dori-slurm-"))
    folder.chmod(0o711)  # munge wants its socket to be within reach
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
