"""Configurations of strangers: nothing is built, called or looked up that is not on a list."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dori_lightning import cli
from dori_lightning.pairs.readers import FolderPairs
from dori_lightning.tasks.status import jobs_of
from support.runs import write_pairs

# A thing that Hydra itself would build without a word.
COPY = "{_target_: shutil.copyfile, src: here, dst: mark}"
REACHED = "{_target_: dori_lightning.runtime.artifacts.os.mkdir, path: mark}"
CALLED = "{class: logging.os.mkdir, path: mark}"

ANYWHERE = "# @package _global_\nhydra: "

CONFIGS = {
    "a mitigation": "_target_: shutil.copyfile\nsrc: here\ndst: mark\n",
    "a part of one": f"name: own\nparts: [{COPY}]\n",
    "through the package": REACHED,
    "a callback": ANYWHERE + f"{{callbacks: {{x: {COPY}}}}}",
    "a callback through the package": ANYWHERE + f"{{callbacks: {{x: {REACHED}}}}}",
    "a callback by its package": f"# @package hydra.callbacks\nx: {COPY}\n",
    "a target out of the environment": ANYWHERE + "{callbacks: {x: {_target_: '${oc.env:HOME}'}}}",
    "a launcher": ANYWHERE + "{launcher: {_target_: shutil.copyfile}}",
    "a factory of a log handler": ANYWHERE
    + "{job_logging: {handlers: {x: {'()': os.mkdir, path: mark}}, root: {handlers: [x]}}}",
    "a class of a log handler": ANYWHERE + f"{{job_logging: {{handlers: {{x: {CALLED}}}}}}}",
    "Hydra's own log": ANYWHERE + f"{{hydra_logging: {{handlers: {{x: {CALLED}}}}}}}",
    "an import of a log handler": ANYWHERE
    + "{job_logging: {handlers: {console: {stream: 'ext://evil.stream'}}}}",
}


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """Folders of tasks that were begun, which none may be; all checks are the real ones."""
    begun: list[Path] = []
    task = SimpleNamespace(run=lambda cfg, folder: begun.append(folder))
    monkeypatch.setattr(cli, "_task", lambda name: task)
    return begun


@pytest.mark.parametrize(
    ("what", "sweep"),
    [
        *((what, False) for what in CONFIGS),
        ("a callback", True),
        ("a class of a log handler", True),
    ],
)
def test_what_a_strangers_config_names_is_not_built(run, tmp_path, capsys, started, what, sweep):
    file = tmp_path / "mine" / "mitigation" / "own.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIGS[what])
    (tmp_path / "here").write_text("copied")
    # in the folder that python -m looks for modules in
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('mark').touch()\n")
    arguments = ["-m", "seed=1,2", "mitigation=own"] if sweep else ["mitigation=own"]
    assert run("--config-dir", "mine", *arguments, task=None) == 2
    said = capsys.readouterr()
    assert "dori: refused to " in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not (tmp_path / "mark").exists()
    assert started == []


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x={_target_:shutil.copyfile,src:here,dst:mark}",
        "+hydra.callbacks.x._target_=os.getcwd",
        "+logger.x={_target_:shutil.copyfile,src:here,dst:mark,_partial_:true}",
        "hydra.launcher._target_=os.getcwd",
        "+hydra.job_logging.handlers.x={class:logging.os.mkdir,path:mark}",
    ],
)
def test_what_an_override_names_is_not_built(run, tmp_path, capsys, started, override):
    (tmp_path / "here").write_text("copied")
    assert run(override, task=None) == 2
    assert "dori: refused to " in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert started == []


def test_a_config_beside_the_data_is_not_composed(run, tmp_path):
    write_pairs(tmp_path / "pairs")
    for name in ("config.yaml", "pairs.yaml", "folder.yaml", ".hydra/config.yaml"):
        path = tmp_path / "pairs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("# @package _global_\nseed: 999\n")
        (tmp_path / path.name).write_text("# @package _global_\nseed: 999\n")
    seen: list[int] = []
    arguments = ("pairs=folder", "pairs.path=pairs")
    assert run(*arguments, task=lambda cfg, folder: seen.append(cfg.seed)) == 0
    assert seen == [0]


@pytest.mark.parametrize("list_name", ["metadata.csv", "metadata.jsonl"])
def test_interpolations_in_a_list_of_pairs_are_text(tmp_path, monkeypatch, list_name):
    monkeypatch.setenv("DORI_PASSWORD", "canary7f3e9d")
    folder = write_pairs(tmp_path / "pairs", vm=1, control=0)
    prompt = "${oc.env:DORI_PASSWORD} {{ 7 * 7 }} $HOME %(x)s"
    (folder / "metadata.csv").unlink()
    row = f'{{"file_name": "0.png", "prompt": "{prompt}"}}'
    if list_name.endswith(".csv"):
        row = f'file_name,prompt\n0.png,"{prompt}"'
    (folder / list_name).write_text(row + "\n")
    assert [pair.prompt for pair in FolderPairs(folder).read()] == [prompt]


def test_interpolations_in_a_strangers_sweep_are_not_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("DORI_PLACE", "canary7f3e9d")
    job = tmp_path / "a" / ".hydra"
    job.mkdir(parents=True)
    (job / "overrides.yaml").write_text("- name=${oc.env:DORI_PLACE}\n")
    (tmp_path / "multirun.yaml").write_text(
        "hydra:\n"
        "  sweeper: {params: {seed: '1,2'}}\n"
        "  overrides: {task: ['name=${oc.env:DORI_PLACE}']}\n"
    )
    found = jobs_of([tmp_path])
    assert len(found.unstarted) == 2
    assert "canary" not in repr(found)
