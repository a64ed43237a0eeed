"""Canaries planted as secrets, and every byte searched of what the program writes."""

import logging
from pathlib import Path

import pytest
import wandb
from omegaconf import OmegaConf

from dori_lightning import config
from dori_lightning.runtime.artifacts import claim_folder, write_json
from dori_lightning.runtime.redaction import redact, secrets_in
from dori_lightning.tasks.run_record import to_container, tracked
from dori_lightning.types import InputError
from support.in_process import bytes_with

CANARY = "canary7f3e9d"
HUB = "hf_" + CANARY * 2
PLACE = f"https://me:{CANARY}@example.org/weights"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Secrets in the environment, as users have them, and one under a harmless name."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", HUB)
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY:x<40}")
    monkeypatch.setenv("DORI_PASSWORD", CANARY)
    monkeypatch.setenv("DORI_PLACE", PLACE)


# --- refused before anything is written


@pytest.mark.parametrize(
    "arguments",
    [
        [f"+checkpoint.token={CANARY}"],
        [f"checkpoint.token={CANARY}"],
        [f"+logger.wandb.api_key={CANARY}"],
        [f"+logger.wandb={{api_key: {CANARY}, project: x}}"],
        [f"paths.output=s3://user:{CANARY}@host/x"],
        [f"pairs.path={PLACE}"],
        [rf"pairs.path=https\://me\:{CANARY}\@example.org/x"],
        [f'checkpoint.source="{PLACE}"'],
        [f"checkpoint.name=hf_{'x' * 20}{CANARY}"],
        [f"checkpoint.name={CANARY}"],
        ["name=${oc.env:DORI_PASSWORD}"],
        ["checkpoint.source=${oc.env:HF_TOKEN,none}"],
        ["name=${oc.env:DORI_PLACE}"],
        [f"hydra.job.env_set.WANDB_API_KEY={CANARY}"],
        [f"+hydra.job.env_set.DB_PASSWORD={CANARY}"],
        ["-m", "seed=1,2", f"+checkpoint.token={CANARY}"],
        ["-m", f"checkpoint.source={PLACE},b"],
        ["-m", f"+checkpoint.token={CANARY},b"],
    ],
)
def test_secrets_in_a_command_are_refused_and_not_repeated(run, tmp_path, capsys, arguments):
    started: list[Path] = []
    assert run(*arguments, task=lambda cfg, folder: started.append(folder)) == 2
    said = capsys.readouterr()
    assert started == []
    assert CANARY not in said.out + said.err
    assert said.err.count("dori: ") == 1
    for part in ("where: ", "fix: "):
        assert part in said.err
    assert not (tmp_path / "outputs").exists(), "nothing was written"
    assert bytes_with(CANARY, tmp_path) == []


def test_the_right_variable_is_named(run, capsys):
    assert run(f"+logger.wandb.api_key={CANARY}") == 2
    said = capsys.readouterr().err
    assert "where: logger.wandb.api_key=<redacted>" in said
    assert "WANDB_API_KEY" in said
    assert "HF_TOKEN" in said


@pytest.mark.parametrize("sweep", [False, True])
def test_secrets_in_a_config_file_are_refused(run, tmp_path, capsys, sweep):
    file = tmp_path / "mine" / "mitigation" / "own.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# of this test\nname: own\nhub_token: " + CANARY + "\n")
    arguments = ["-m", "mitigation=none,own"] if sweep else ["mitigation=own"]
    assert run("--config-dir", "mine", *arguments) == 2
    said = capsys.readouterr()
    assert "where: mitigation.hub_token" in said.err
    assert CANARY not in said.out + said.err
    assert bytes_with(CANARY, tmp_path) == [file]


def test_no_option_of_the_project_sounds_like_a_secret():
    files = sorted(config.CONF.rglob("*.yaml"))
    assert len(files) > 50
    for file in files:
        held = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if isinstance(held, dict):
            held.pop("hydra", None)
        if file.parent.parent.name != "hydra":
            assert list(secrets_in(held)) == [], file


# --- what comes in another way stays out of files and logs


@pytest.fixture
def client():
    """W&B's client reads its environment once in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


def careless(cfg, folder):
    """A task that tells everybody what it knows."""
    with tracked(cfg, folder) as tracker:
        claim_folder(folder, to_container(cfg))
        write_json(folder / "found.json", {})  # without a result the claim would be withdrawn
        logging.getLogger("dori_lightning.x").info(
            "opening %s with %s", cfg.checkpoint.source, HUB
        )
        logging.getLogger("other").warning("Authorization: Bearer %s", CANARY * 2)
        logging.getLogger("other").warning("%s", {"api_key": "another secret", "steps": 3})
        tracker.summary({"verdict": "clean"})
        assert len(tracker.loggers) == 2
        raise (InputError if cfg.seed == 1 else RuntimeError)(f"no {PLACE}: {CANARY}\nand {HUB}")


@pytest.mark.usefixtures("client")
def test_no_byte_of_a_sweep_holds_a_secret(run, tmp_path, capsys):
    arguments = (
        "-m", "seed=1,2", "sweep=leaky", "logger=[csv,wandb]", "logger.wandb.offline=true",
        "checkpoint.source=${oc.env:DORI_PLACE}",
    )  # fmt: skip
    for _ in range(2):  # the second time finds the folder of the first, and goes on in it
        assert run(*arguments, task=careless) != 0
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err
    assert "dori: no https://example.org/weights: <redacted>" in said.err
    assert "Traceback" in said.err
    sweep = tmp_path / "outputs" / "sweeps" / "leaky"
    written = {path.name for path in sweep.rglob("*") if path.is_file()}
    assert {
        "multirun.yaml", "config.yaml", "hydra.yaml", "overrides.yaml", "dori.log", "status.json",
        "method.json",
    } <= written  # fmt: skip
    assert any(name.endswith(".wandb") for name in written)
    assert bytes_with(CANARY, tmp_path) == []
    assert bytes_with("another secret", tmp_path) == []
    jobs = sorted(path.parent for path in sweep.rglob("status.json"))
    assert len(jobs) == 2
    for job in jobs:
        assert "opening https://example.org/weights" in (job / "dori.log").read_text()
        assert '"error": "no https://example.org/weights' in (job / "status.json").read_text()


def test_text_of_many_forms_is_redacted():
    for text in (
        f"password='{CANARY} b'", f"x?token={CANARY}", f"{{'api_key': '{CANARY}'}}",
        f"+logger.x={{api_key:{CANARY},project:x}}", f"ghp_{'a' * 20}{CANARY}",
        f"got {CANARY} from the environment", f"Bearer {CANARY}",
    ):  # fmt: skip
        clean = redact(text)
        assert CANARY not in clean, text
        assert redact(clean) == clean
    for text in ("step=3 of 10, key_dim=4", "a photo of a key: rusty", "http://example.org/a@b"):
        assert redact(text) == text


def test_where_a_secret_lies_is_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/.cache/token")
    assert redact("read /home/me/.cache/token") == "read /home/me/.cache/token"
    assert redact({"key_file": "x.pem"}) == {"key_file": "x.pem"}
