"""What the safety tests share: the program in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.in_process import Program, program_in


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Program]:
    """The program in this process, in ``tmp_path``, with a stand-in for the task."""
    with program_in(tmp_path) as run:
        yield run
