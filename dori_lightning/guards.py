"""Commands that would go wrong without a word, refused with the right one in the message."""

import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from hydra.conf import HydraConf

__all__ = [
    "CLOCK",
    "command",
    "refuse_clock",
    "refuse_device_sweep",
    "refuse_rerun",
    "refuse_sweep_over_processes",
]

CLOCK = "${now:"
"""How a setting asks the clock."""

_ONE_DEVICE = ("trainer.devices", "trainer.num_nodes")


def refuse_rerun(arguments: list[str]) -> None:
    """Refuse the one flag of Hydra's that unpickles a file."""
    for argument in arguments:
        if argument.startswith("--e"):
            raise InputError(
                f"{argument.partition('=')[0]} loads a pickle, which may execute anything\n"
                "  where: command line\n"
                "  mend:  give the command of the run again; it finishes what is missing"
            )


def refuse_device_sweep(arguments: list[str]) -> None:
    """Refuse ``trainer.devices=1,2``: the first job's process group leaks into the second."""
    parser = OverridesParser.create()
    for argument in arguments:
        if not argument.lstrip("+").startswith(_ONE_DEVICE):
            continue
        override = parser.parse_override(argument)
        if override.is_sweep_override():
            rest = [a for a in arguments if a not in (argument, "-m", "--multirun")]
            values = override.sweep_string_iterator()
            raise InputError(
                f"{override.key_or_group} cannot be swept: jobs of one sweep share a process\n"
                f"  where: {argument}\n"
                "  mend:  one run for each value:\n"
                + "\n".join(command([*rest, f"{override.key_or_group}={v}"]) for v in values)
            )


def refuse_sweep_over_processes(cfg: DictConfig, settings: "HydraConf") -> None:
    """Refuse a sweep whose jobs would relaunch the whole sweep to get their other processes."""
    if settings.mode is not RunMode.MULTIRUN:
        return
    swept = OmegaConf.select(settings, "sweeper.params") or {}  # type: ignore[arg-type]
    over = next((key for key in _ONE_DEVICE if key in swept), None)
    devices = cfg.trainer.get("devices", 1)
    nodes = cfg.trainer.get("num_nodes", 1)
    several = str(devices) not in ("1", "[0]", "0,") or nodes != 1
    # submitit starts one task per rank itself: nothing is relaunched
    ranks_started = _tasks(cfg, settings) == (devices, nodes)
    if over is None and (not several or ranks_started):
        return
    overrides = [
        o for o in settings.overrides.task if not o.lstrip("+").startswith("trainer.devices=")
    ]
    if over is None:
        asked = f"trainer.devices={devices}, trainer.num_nodes={nodes}"
        what = f"a sweep runs one device per job, not {asked}"
    else:
        what = f"{over} cannot be swept: jobs of one sweep share a process"
    sys.stderr.write(
        f"dori: {what}\n"
        f"  where: {'hydra.sweeper.params' if over else 'trainer'}\n"
        "  mend:  run each job by itself, as in\n"
        f"{command([*overrides, f'trainer.devices={devices}'])}\n"
        "         or sweep with one device per job: trainer.devices=1 trainer.num_nodes=1\n"
        "         or on SLURM, which starts every process itself: hydra/launcher=slurm_ddp\n"
    )
    # Not an error of this job alone: the rest of the sweep must not start.
    sys.exit(2)


def _tasks(cfg: DictConfig, settings: "HydraConf") -> tuple[Any, Any]:
    """Tasks per node and nodes that the launcher starts for a job; its own may follow trainer."""
    # a job's Hydra node stands alone, and what it says of the trainer's would lead nowhere
    launcher = OmegaConf.to_container(settings.launcher, resolve=False)
    view = OmegaConf.create({"trainer": cfg.trainer, "launcher": launcher})
    return view.launcher.get("tasks_per_node", 1), view.launcher.get("nodes", 1)


def refuse_clock(cfg: DictConfig) -> None:
    """Refuse a folder named after the time where several processes would each ask the clock."""
    started = max(
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    )
    # those that Lightning starts are told the folder
    if started == 1:
        return
    given = OmegaConf.to_container(cfg, resolve=False)
    hydra = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=False)
    assert isinstance(given, dict)
    assert isinstance(hydra, dict)
    settings = {
        "hydra.run.dir": hydra["hydra"]["run"]["dir"],
        "paths.output": given["paths"]["output"],
        "name": given["name"],
    }
    for key, text in settings.items():
        if CLOCK in str(text):
            raise InputError(
                f"each of {started} processes would have a folder of its own: all ask the clock\n"
                f"  where: {key}={text}\n"
                f"  mend:  give the run a fixed name: name=NAME"
            )


def command(arguments: list[str]) -> str:
    """The command line of some arguments, indented as messages have it."""
    return f"         python -m dori_lightning {shlex.join(arguments)}"
