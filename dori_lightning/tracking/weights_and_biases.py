"""Open a Weights & Biases run for a run folder, offline where nobody is logged in."""

from __future__ import annotations

import netrc
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from dori_lightning.tracking.identity import RunIdentity

__all__ = ["WeightsAndBiases"]

_LONGEST_TAG = 64

_FIRST_HOST = "api.wandb.ai"
"""Where keys belong that were stored before the client's address changed."""


@dataclass(frozen=True)
class WeightsAndBiases:
    """How runs appear in Weights & Biases; there is no setting for a key, on purpose.

    Attributes:
        project: Project that the runs belong to.
        entity: Team or user; None for the account's default.
        group: Group of the run; None for the id of the sweep, made once for all its jobs.
        name: Readable name; None for the overrides in which a sweep's jobs differ.
        tags: Tags besides checkpoint, mitigation and version.
        offline: Write into the run folder alone, for ``wandb sync``; None to do so where neither
            ``WANDB_API_KEY`` nor ``wandb login`` gives a key. ``WANDB_MODE`` decides over None.
    """

    project: str = "dori_lightning"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    offline: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", tuple(self.tags))

    def start(self, run: RunIdentity, folder: Path) -> WandbLogger:
        """Open the run.

        Args:
            run: Who it is.
            folder: Where its files go.

        Raises:
            InputError: It is to be online, and there is no key or no connection.
        """
        import wandb

        try:
            started = wandb.init(
                project=self.project,
                entity=self.entity,
                dir=str(folder),
                # an agent of a W&B sweep names the runs that it starts
                id=os.environ.get("WANDB_RUN_ID") or run.id,
                resume="allow",
                name=self.name or run.name,
                group=self.group or run.group,
                job_type=run.job_type,
                tags=[*dict.fromkeys(tag[:_LONGEST_TAG] for tag in (*run.tags, *self.tags))],
                config=dict(run.config),
                mode=self._mode(),
                # the client's own metadata holds the command line as it was typed, secrets too
                settings=wandb.Settings(x_disable_meta=True, disable_git=True),
            )
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise InputError(
                f"no online run in Weights & Biases: {str(error).strip().partition(chr(10))[0]}\n"
                f"  where: logger.wandb\n"
                f"  mend:  wandb login, or logger.wandb.offline=true and later: wandb sync FOLDER"
            ) from error
        return WandbLogger(experiment=started, save_dir=folder)

    def _mode(self) -> Any:
        """W&B's mode; None leaves it to ``WANDB_MODE``."""
        if self.offline is None and "WANDB_MODE" in os.environ:
            return None
        offline = not _key_is_set() if self.offline is None else self.offline
        return "offline" if offline else "online"


def _key_is_set() -> bool:
    """Whether the environment, the client's settings or a netrc file hold a key; asks nobody."""
    import wandb

    settings = wandb.setup().settings
    if os.environ.get("WANDB_API_KEY") or settings.api_key or settings.identity_token_file:
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except FileNotFoundError:
        return False
    except netrc.NetrcParseError as error:
        raise InputError(
            f"cannot look for a key of Weights & Biases: {error}\n"
            f"  where: {error.filename}\n"
            f"  mend:  mend the file, or say logger.wandb.offline=true or false"
        ) from None
    hosts = (urlsplit(settings.base_url).netloc, _FIRST_HOST)
    return any(known.authenticators(host) is not None for host in hosts)
