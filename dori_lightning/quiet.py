"""Keep the libraries' remarks out of the way of what a run says."""

import logging
import sys
import warnings

__all__ = ["quiet_libraries"]

_REMARKS = (
    # said under SLURM, where a launcher started the job already
    r"The `srun` command is available on your system but is not used",
    # between Lightning and torch; nothing a user can mend
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def quiet_libraries() -> None:
    """Let Lightning log through the run's own handlers, and only what asks for attention.

    Lightning gives its loggers a console of their own at import, so that every line came twice; of
    each Trainer, and an audit makes several, it tells the devices and an advertisement. Devices
    are in the report's provenance. To be called after Lightning's import.
    """
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in (
        "lightning.fabric.utilities.rank_zero",
        "lightning.pytorch.utilities.rank_zero",
        # at every checkpoint that is written, of a default
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    # said of a list of modules that is empty for every checkpoint read here
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_about_no_module)
    transformers = sys.modules.get("transformers")
    if transformers is not None:  # a bar for two tenths of a second, in every log
        transformers.utils.logging.disable_progress_bar()
    for remark in _REMARKS:
        warnings.filterwarnings("ignore", message=remark)


def _about_no_module(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()
