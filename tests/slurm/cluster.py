"""A SLURM of two nodes on this machine, with everything of it in one folder."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

TEMPLATE = Path(__file__).with_name("slurm.conf.in")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged")
MODULES = ("submitit", "hydra_plugins.hydra_submitit_launcher")


def missing():
    """What the machine lacks for a SLURM of its own."""
    lacks = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    for name in MODULES:
        try:
            found = find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            lacks.append(name)
    if os.geteuid() != 0:
        lacks.append("root, whom its daemons run as")
    return lacks


def _path():
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@dataclass
class Job:
    """One line of the queue.

    Attributes:
        number: Job number, with the array's as ``4_1``.
        state: ``RUNNING``, ``PENDING`` and so on.
        node: Where it runs.
    """

    number: str
    state: str
    node: str


class Cluster:
    """munge, one controller and two nodes; ``stop`` ends what ``start`` began and nothing else."""

    def __init__(self, folder):
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
            # the nodes' names are known to nobody but SLURM
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self):
        """Start the daemons and wait until both nodes are idle."""
        self._configure()
        munge = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        options = [f"--{name}={self.folder / file}" for name, file in munge.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munge")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-c", "-N", node)
        self._until(self._both_idle, "two idle nodes")

    def stop(self):
        """End the jobs and the daemons; jobs that are cut in the middle would outlive these."""
        # what waits, then what runs, which may ignore the first signal
        for how in ([], ["--signal=KILL"]):
            subprocess.run(
                ["scancel", "--me", "--full", *how],
                env=self.environment, check=False, timeout=30,
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while self._busy() and time.monotonic() < deadline:
            time.sleep(0.3)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def ask(self, *command):
        """Output of one of SLURM's commands."""
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def queue(self):
        """Jobs that wait or run."""
        lines = self.ask("squeue", "--noheader", "--array", "--format=%i|%T|%N").splitlines()
        return [Job(*line.split("|")) for line in lines if line.strip()]

    def _busy(self):
        """Whether any job is left, also one that is being cleaned up."""
        try:
            return bool(self.queue())
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return False  # nobody answers

    def _both_idle(self):
        done = subprocess.run(
            ["scontrol", "show", "nodes", "--oneliner"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout.count("State=IDLE ") == 2

    def _configure(self):
        for name in ("ctld", "d.n1", "d.n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        words = {
            "DIR": str(self.folder),
            "HOST": socket.gethostname().partition(".")[0],
            **dict(zip(("CTLD_PORT", "N1_PORT", "N2_PORT"), _free_ports(3), strict=True)),
        }
        text = TEMPLATE.read_text("utf-8")
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        (self.folder / "slurm.conf").write_text(text, "utf-8")

    def _daemon(self, *command):
        with (self.folder / f"{Path(command[0]).name}.{len(self.daemons)}.out").open("wb") as out:
            self.daemons.append(
                # in a session of its own: Ctrl+C is for the tests, which then end jobs and daemons
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _until(self, ready, what, seconds=60):
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [d for d in self.daemons if d.poll() is not None]
            if ended or time.monotonic() > deadline:
                said = {p.name: p.read_text(errors="replace")[-1500:] for p in self._logs()}
                raise RuntimeError(f"SLURM has no {what}:\n{json.dumps(said, indent=1)}")
            time.sleep(0.3)

    def _logs(self):
        return [*self.folder.glob("*.log"), *self.folder.glob("*.out")]


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
