"""What every test shares: one thread, no network, no Hydra state from the test before."""

import os

# Before anything imports torch.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
)
os.environ.pop("HYDRA_FULL_ERROR", None)

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from dori_lightning import config
from support.in_process import Program, program_in
from support.runs import write_material


@pytest.fixture(autouse=True)
def fresh_hydra() -> Iterator[None]:
    """Hydra and its config store are global to the process."""
    GlobalHydra.instance().clear()
    config.register()
    yield
    GlobalHydra.instance().clear()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Program]:
    """The program in this process, in an empty folder: ``run(*arguments, task=function)``."""
    with program_in(tmp_path) as program:
        yield program


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint and five pairs, to be read only."""
    return write_material(tmp_path_factory.mktemp("material"))
