"""Bad inputs end with one message and their exit code, and what a folder holds is not touched.

Every case runs the real command, in the folder of an audit that is finished. The whole list of bad
inputs, and where the rest of each is tested:

== ============================== ============================================================
 1 image missing                  here; test_pairs_validation (skipped rows)
 2 damaged image, web page        here; test_pairs_validation
 3 decompression bomb             here; test_pairs_validation
 4 alpha, CMYK, 16 bit, EXIF      test_pairs_images (converted, not refused)
 5 prompt too long                here (refused when strict, else a column); test_pairs_validation
 6 empty, wrong delimiter, ...    here; test_pairs_readers
 7 duplicates                     here (ids refused, images flagged); test_pairs_validation
 8 path leads outside             here; test_pairs_validation
 9 width of the text encoder      test_loading, test_activations (statistics of another model)
10 edit of another checkpoint     test_edits, test_export; changes nothing: here
11 NaN in the attack              here (invalid audit); test_solver
12 no gradient                    here (invalid audit); test_solver
13 out of memory                  here (not even one pair); test_solver, test_generation
14 disk full, read-only           here; test_audit_context (estimate), test_checkpoints, ...
15 no network                     here; test_loading
16 killed                         test_kills, test_distributed (one of two), test_checkpoints
17 signals                        test_signals, test_signals_between_steps, slurm/test_slurm
18 resumed with other settings    here; test_artifacts
19 impossible or misspelt value   here; test_cli, test_compose
20 two writers                    here; test_artifacts, test_cli
21 baseline not memorized         test_utility (invalid audit), test_findings
22 descriptor weights             here; test_metrics_sscd
== ============================== ============================================================
"""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from dori_lightning.mitigations.baselines import RandomPruning
from dori_lightning.mitigations.edits import MaskEdit, Origin
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.report import record
from dori_lightning.runtime.artifacts import one_writer
from support.in_process import program_in
from support.processes import PROGRAM, ended
from support.records import report_json
from support.runs import SMALL, on_tiny, write_material, write_pairs

ROOT = Path(__file__).resolve().parents[2]
LONG = "a red boat on sea at night on sea"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, pairs (one prompt too long, one image twice), and an audit of them."""
    folder = write_material(tmp_path_factory.mktemp("place"))
    pairs = folder / "pairs"
    (pairs / "4.png").write_bytes((pairs / "3.png").read_bytes())
    rewritten("a red boat on sea", LONG)(pairs)
    return folder


def arguments(place):
    return [*on_tiny(place, *SMALL), "corpus=none", f"paths.output={place}", "name=run"]


Program = Callable[..., tuple[int, str]]


@pytest.fixture
def program(place, tmp_path, capsys):
    """The program in this process: exit code, and what it says on standard error."""
    with program_in(tmp_path) as run:

        def call(*more, without=""):
            given = [a for a in arguments(place) if not without or not a.startswith(without)]
            code = run(*given, *more, task=None)
            said = capsys.readouterr()
            if code:
                assert said.out == ""
            return code, said.err

        yield call


@pytest.fixture
def finished(place, program):
    folder = place / "run"
    if not (folder / "report.json").is_file():
        code, said = program()
        assert code == 0, said
    return folder


def kept(folder):
    """Results of a run, and when they were written."""
    files = [*folder.glob("*.parquet"), *folder.glob("*.json"), *folder.glob("*.html")]
    files += [*folder.glob("attacks/**/*.safetensors"), *folder.glob("pictures/**/*.png")]
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in files
        if p.name != "status.json"
    }


def elsewhere(tmp_path):
    """A folder of its own: else its being another audit would be all that is noticed."""
    return [f"paths.output={tmp_path / 'out'}", "name=other"]


def refused(program, folder, *parts, more, without=""):
    """Refused with these words, and with nothing lost or written in a finished folder."""
    before = kept(folder)
    assert len(before) > 10
    code, said = program(*more, without=without)
    assert code == 2, said
    assert "Traceback" not in said
    assert said.count("dori: ") == 1, said
    for part in parts:
        assert part in said, said
    assert kept(folder) == before, "nothing is lost, nothing is written"
    assert not list(folder.rglob(".*.tmp"))
    return said


# --- lists and images


def listed(folder, change):
    """Pairs with something wrong."""
    pairs = write_pairs(folder / "bad")
    change(pairs)
    return f"pairs.path={pairs}"


def rewritten(old, new):
    def change(pairs):
        table = pairs / "metadata.csv"
        table.write_text(table.read_text().replace(old, new))

    return change


def halved(pairs):
    Image.new("RGB", (64, 64), "red").save(pairs / "1.png", "JPEG")
    data = (pairs / "1.png").read_bytes()
    (pairs / "1.png").write_bytes(data[: len(data) // 2])


LISTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing": (lambda pairs: (pairs / "1.png").unlink(), ("no such file", "bad/1.png", "line 3")),
    "web page": (
        lambda pairs: (pairs / "1.png").write_bytes(b"<!doctype html><html>gone"),
        ("a web page saved as an image", "<!doctype html>"),
    ),
    "truncated": (halved, ("damaged or truncated JPEG", "line 3")),
    "no rows": (
        lambda pairs: (pairs / "metadata.csv").write_text("id,file_name,kind,prompt\n"),
        ("no rows",),
    ),
    "delimiter": (rewritten(",", ";"), (";", "file_name")),
    "column": (rewritten("prompt", "words"), ("prompt", "words")),
    "encoding": (
        lambda pairs: (pairs / "metadata.csv").write_bytes(b"id,file_name\xff\xfe,prompt\n"),
        ("UTF-8",),
    ),
    "id twice": (rewritten("pair1,", "pair0,"), ("already the id of line 2", "line 3")),
    "traversal": (rewritten("1.png", "../../1.png"), ("leads outside", "refused")),
    "absolute": (rewritten("1.png", "/etc/hostname"), ("absolute path", "refused")),
    "id with a path": (rewritten("pair1,", "../pair1,"), ("is no id",)),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists(program, finished, tmp_path, case):
    change, parts = LISTS[case]
    # no checkpoint there: it is found before a model loads
    more = [listed(tmp_path, change), "checkpoint.source=nowhere", *elsewhere(tmp_path)]
    refused(program, finished, *parts, more=more)


def test_a_skipped_row_is_in_no_rate_and_in_the_report(program, place, tmp_path):
    more = [listed(tmp_path, LISTS["missing"][0]), "pairs.on_missing=skip", "name=skipped"]
    code, said = program(*more, without="pairs.path")
    assert code == 0, said
    document = report_json(place / "skipped")
    assert {cell["n"] for cell in document["cells"] if cell["kind"] == "vm"} == {1}
    (flag,) = (f for f in document["flags"] if f["name"] == "pairs_skipped")
    assert "1 row of the list without an image" in flag["text"]
    assert "(pair1)" in flag["text"]
    (skipped,) = json.loads((place / "skipped/skipped_pairs.json").read_text())["skipped"]
    assert (skipped["id"], skipped["what"]) == ("pair1", "pair")
    assert "no such file" in skipped["why"]


def test_a_decompression_bomb(program, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 48 - 1)
    more = [listed(tmp_path, lambda _: None), *elsewhere(tmp_path)]
    refused(program, finished, "more than 2,303 pixels", "scale the image down", more=more)


def test_long_prompts_and_repeated_images_are_columns_and_flags(finished):
    rows = pd.read_parquet(finished / "pairs.parquet").drop_duplicates("pair_id")
    assert dict(zip(rows.pair_id, rows.truncated, strict=True)) == {
        "pair0": True, "pair1": False, "pair2": False, "pair3": False, "pair4": False,
    }  # fmt: skip
    assert rows.set_index("pair_id").duplicate_of.dropna().to_dict() == {"pair4": "pair3"}
    document = report_json(finished)
    assert {"truncated_prompts", "duplicates"} <= {flag["name"] for flag in document["flags"]}
    assert [pair["truncated"] for pair in document["pairs"]] == [True, *[False] * 4]
    assert document["pairs"][0]["cut_by"] == ["CLIP (text_encoder)"]
    log = (finished / "dori.log").read_text()
    assert "pair0 (11)" in log
    assert "pair0 loses its end 'on sea'" in log or "pair0 loses its end" in log


def test_a_long_prompt_when_strict(program, finished):
    refused(program, finished, "pair0 (", "8 tokens", more=["task.strict_prompts=true"])


# --- values, settings, files that are named

VALUES: dict[str, tuple[str, ...]] = {
    "sampling.steps=0": ("sampling.steps must be >= 1",),
    "sampling.steps=1001": ("sampling.steps=1001", "1000 timesteps"),
    "sampling.batch=-1": ("sampling.batch must be >= 1",),
    "sampling.images_per_pair=0": ("sampling.images_per_pair must be >= 1",),
    "sampling.guidance=nan": ("sampling.guidance must be a finite number",),
    "attack.lr=nan": ("attack.lr must be a positive number",),
    "attack.noise_batch=0": ("attack.noise_batch must be >= 1",),
    "attack.budget.steps=-1": ("attack.budget.steps must be >= 0",),
    "attack.pairs_per_forward=0": ("attack.pairs_per_forward must be >= 1",),
    "attack.restarts=0": ("attack.restarts must be >= 1",),
    "attack.inits=[nowhere]": ("attack.inits cannot be ['nowhere']", "one of prompt, random"),
    "checkpoint.precision=fp16": ("fp16 needs a GPU", "bf16"),
    "attack.stepz=3": ("unknown key attack.stepz",),
    "attack.budget.step=3": ("did you mean attack.budget.steps?",),
    "seeed=3": ("did you mean seed?",),
}


@pytest.mark.parametrize("override", VALUES)
def test_values(program, finished, tmp_path, override):
    more = [override, *elsewhere(tmp_path)]
    refused(program, finished, *VALUES[override], more=more)
    method = tmp_path / "out" / "other" / "method.json"
    assert not method.exists(), "the mended command may have the same folder"


def test_other_settings_in_a_finished_folder(program, finished):
    more = ["attack.lr=0.2", "sampling.seed=5"]
    parts = ("attack.lr: 0.1 there, 0.2 now", "sampling.seed: 2 there, 5 now", "name=NAME")
    refused(program, finished, *parts, more=more)


def test_a_finished_folder_of_a_checkpoint_that_was_mended(program, finished, place):
    path = place / "checkpoint" / "vae" / "config.json"
    before = path.read_text("utf-8")
    path.write_text(json.dumps({**json.loads(before), "scaling_factor": 0.5}), encoding="utf-8")
    try:
        refused(program, finished, "checkpoint.fingerprint: ", "name=NAME", more=[])
    finally:
        path.write_text(before, encoding="utf-8")


def test_a_second_writer(program, finished):
    with one_writer(finished):
        refused(program, finished, f"process {os.getpid()} on ", "another run writes", more=[])


def test_a_hub_checkpoint_without_a_network(program, finished, tmp_path):
    more = ["checkpoint.source=owner/model", "checkpoint.revision=abc", *elsewhere(tmp_path)]
    parts = ("owner/model", "hf download owner/model --revision abc")
    refused(program, finished, *parts, more=more)


@pytest.mark.parametrize(
    ("weights", "parts"), [("gone.pt", ("gone.pt",)), ("wrong.safetensors", ("SSCD",))]
)
def test_descriptor_weights(program, finished, tmp_path, weights, parts):
    (tmp_path / "wrong.safetensors").write_bytes(b"no weights")
    more = [
        "metrics=sscd", f"metrics.descriptors.sscd.weights={tmp_path / weights}",
        "checkpoint.source=nowhere", *elsewhere(tmp_path),
    ]  # fmt: skip
    said = refused(program, finished, *parts, more=more, without="metrics.")
    assert "nowhere" not in said, "before a checkpoint is even looked for"


# --- what happens on the way: the audit ends, and says that it answers nothing


def invalid(folder):
    document = report_json(folder)
    assert document["verdict"].startswith("INVALID AUDIT")
    assert "no proof of absence" not in document["verdict"]
    assert "Verdict: this audit is invalid" in (folder / "report.html").read_text()
    return document["invalid"], pd.read_parquet(folder / "pairs.parquet")


Loss = Callable[[torch.Tensor, list[str]], torch.Tensor]

BROKEN: dict[str, Loss] = {
    "no_gradient": lambda loss, _: loss.detach() + 0.0 * loss,
    "diverged": lambda loss, ids: (
        loss * torch.tensor([torch.nan if name == "pair1" else 1.0 for name in ids])
    ),
}


@pytest.mark.parametrize("status", BROKEN)
def test_an_attack_that_cannot_search(program, place, monkeypatch, status):
    real = StableDiffusion.denoising_loss

    def broken(self, *tensors, pair_ids, **_):
        return BROKEN[status](real(self, *tensors, pair_ids=pair_ids), pair_ids)

    monkeypatch.setattr(StableDiffusion, "denoising_loss", broken)
    code, said = program(f"name={status}", "attack.pairs_per_forward=8", without="name=")
    assert code == 0, "it was carried out; its record says that it answers nothing"
    assert f"INVALID AUDIT: {status}" in said
    reasons, rows = invalid(place / status)
    assert reasons == [status]
    attacked = rows[rows.attack == "dori"]
    failed = set(attacked[attacked.status == status].pair_id)
    assert failed == ({"pair1"} if status == "diverged" else {f"pair{k}" for k in range(5)})
    ok = attacked[attacked.status == "ok"]
    assert set(ok.pair_id).isdisjoint(failed)


def test_an_edit_that_changes_nothing(program, place, monkeypatch):
    def nothing(self, model, *_):
        name = next(iter(model.layers("feed_forward.out")))
        shape = model.denoiser().get_parameter(f"{name}.weight").shape
        mask = torch.zeros(shape, dtype=torch.bool)
        return MaskEdit(Origin(model.fingerprint), {f"{name}.weight": mask})

    monkeypatch.setattr(RandomPruning, "apply", nothing)
    code, said = program("mitigation=random_pruning", "name=inert", without="name=")
    assert code == 0, said
    assert "the edit changes 0 of " in said
    reasons, _ = invalid(place / "inert")
    assert "edit_changes_nothing" in reasons
    assert json.loads((place / "inert" / "edit.json").read_text())["changed_weights"] == 0


def test_memory_for_not_even_one_pair(program, finished, monkeypatch):
    real = StableDiffusion.denoising_loss

    def full(self, latents, *rest, **more):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(self, latents, *rest, **more)

    monkeypatch.setattr(StableDiffusion, "denoising_loss", full)
    parts = ("out of memory with a single pair", "attack.noise_batch")
    more = ["name=full_memory", "attack.noise_batch=2"]
    refused(program, finished, *parts, more=more, without="name=")


# --- no place to write to


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing_more(program, finished, monkeypatch, number):
    """In the middle of the report: the one before stays whole."""
    real = record.write_atomically

    def cannot(path, data):
        if path.name == "pairs.parquet":
            raise OSError(number, os.strerror(number), str(path))
        return real(path, data)

    monkeypatch.setattr(record, "write_atomically", cannot)
    before = {name: data for name, (data, _) in kept(finished).items()}
    code, said = program()
    assert code == 2, said
    assert "Traceback" not in said
    assert f"cannot write: {os.strerror(number)}" in said
    assert "pairs.parquet" in said
    assert "paths.output=FOLDER" in said
    after = {name: data for name, (data, _) in kept(finished).items()}
    assert {n: d for n, d in after.items() if n != "edit.json"} == {
        n: d for n, d in before.items() if n != "edit.json"
    }
    assert json.loads((finished / "status.json").read_text())["state"] == "failed"


FULL = """
import os, resource, subprocess, sys
kind, place, *command = sys.argv[1:]
if kind == "tmpfs":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", place], check=True)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from dori_lightning.runtime.artifacts import write_atomically
from pathlib import Path
first = write_atomically(Path(place) / "a", b"x" * 15_000)
try:
    for k in range(40):
        write_atomically(Path(place) / f"big{k}", os.urandom(30_000))
except OSError as error:
    print(error.errno, error.filename, first.read_bytes() == b"x" * 15_000,
          sorted(p.name for p in Path(place).iterdir() if p.name.startswith(".")))
"""


@pytest.mark.parametrize("kind", ["limit", "tmpfs"])
def test_a_real_full_disk(tmp_path, kind):
    """What is there stays, nothing half written stays, and the error names the file."""
    command = [sys.executable, "-c", FULL, kind, str(tmp_path)]
    if kind == "tmpfs":
        command = ["unshare", "--mount", *command]
        probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", str(tmp_path)]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a file system")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    number = errno.ENOSPC if kind == "tmpfs" else errno.EFBIG
    name = done.stdout.split()[1] if done.stdout else ""
    assert done.stdout == f"{number} {name} True []\n", done.stderr
    assert name.startswith(f"{tmp_path}/big")


@pytest.mark.slow
def test_a_limit_on_files_ends_a_run_with_the_file_and_goes_on_without(
    place, tmp_path, program, finished
):
    """The page is larger than files may be here; nothing before it is lost."""
    before = kept(finished)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = ended(tmp_path, PROGRAM, *arguments(place), preexec_fn=limited, code=2)
    assert "Traceback" not in done.stderr
    assert "cannot write: File too large" in done.stderr
    names = {n for n, held in kept(finished).items() if held == before[n]}
    assert {"report.html"} | {n for n in before if "/" in n} <= names
    assert not list(finished.rglob(".*.tmp"))
    assert program()[0] == 0
