"""The log beside the results: one file for each process, and none that breaks a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from dori_lightning.ranks import label

__all__ = ["ProcessFileHandler"]


class ProcessFileHandler(logging.FileHandler):
    """Write the log of this process into a file of its own.

    The first process of a run writes to the file that is named, every other one beside it, as in
    ``dori-3.log`` for the process of rank 3: lines of several processes in one file would be
    mixed, and on a network file system lost.

    Where the file cannot be written any more, such as on a full disk, that is said once and the
    log goes on on standard error alone.
    """

    def __init__(self, filename: str) -> None:
        """Open the file.

        Args:
            filename: Of the first process.
        """
        own = label()
        path = Path(filename)
        if own:
            path = path.with_name(f"dori-{own}{path.suffix}")
        super().__init__(path)
        self._works = True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless an earlier one could not be written."""
        if self._works:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name of logging
        """Say once that the file cannot be written; other mistakes are shown as usual."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._works = False
        sys.stderr.write(f"dori: the log goes on here alone: {self.baseFilename}: {error}\n")
