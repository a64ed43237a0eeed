"""What a certificate says of what a cascade found."""

import json
import math
from pathlib import Path

import pytest

from dori_lightning.certify.cascade import AttackFindings, Level, Tried
from dori_lightning.certify.traces import Trace
from dori_lightning.report.certificate import (
    door_table,
    doors_of,
    make_certificate,
    ranking,
    read_certificate,
    write_certificate,
)
from dori_lightning.report.claims import check_claims, read_claims
from dori_lightning.tasks.results_logging import track_certificate
from dori_lightning.types import InputError, Pair
from support.fake_reports import provenance

LEVELS = ("little", "much")
SUSPECTS = ("s0", "s1")


def tried(pair: str, back: str | None, role: str = "audited") -> Tried:
    levels = LEVELS if back is None else LEVELS[: LEVELS.index(back) + 1]
    return Tried(
        pair, "control" if pair.startswith("c") else "vm", role, "any", levels,
        tuple(10 * (k + 1) for k in range(len(levels))), (0.1,) * len(levels), 0.5,
        None if back is None else len(levels) - 1, 10 * len(levels),
    )  # fmt: skip


def findings(name="dori", back=(), *, controls=(), planted=(), holds="embedding", transfers=False):
    """Suspects, controls and planted images; names of those that come back at the last level."""
    rows = [tried(own, "much" if own in back else None) for own in SUSPECTS]
    rows += [tried(own, "much" if own in controls else None) for own in ("c0", "c1")]
    rows += [tried(own, "little" if own in planted else None, "planted") for own in ("p0", "p1")]
    sound = (True, not controls)
    levels = tuple(
        Level(level, {"controls": len(controls) if k else 0}, {"controls": 2}, sound[k])
        for k, level in enumerate(LEVELS)
    )
    return AttackFindings(
        name, holds, levels, tuple(rows), (), tuple(own for own in back if not controls),
        transfers=transfers,
    )  # fmt: skip


def certificate(*found, traces=(), planted=2, mitigation="any", checkpoint="tiny"):
    return make_certificate(
        checkpoint=checkpoint,
        mitigation=mitigation,
        reference="twin",
        found=found,
        suspects=SUSPECTS,
        not_auditable=(),
        left_out={},
        traces=traces,
        planted=planted,
        provenance=provenance(),
    )


HELD = Trace("s0", 0.5, below=True, above=False)
SHOWS = Trace("s1", 2.0, below=False, above=True)


@pytest.mark.parametrize(
    ("made", "answer", "tone", "words"),
    [
        (certificate(findings(back=("s0",))), "open", "found", "1 of 2 suspected images comes"),
        (certificate(findings(planted=("p0",))), "certified", "clear", "None of 2"),
        (certificate(findings()), "blind", "doubt", "could not have shown it"),
        (certificate(findings(), planted=None), "unchecked", "doubt", "None of 2"),
        (
            certificate(findings(planted=("p0", "p1")), traces=(HELD,)),
            "held", "doubt", "still holds 1 of them",
        ),
        (certificate(findings(back=("s0",), controls=("c0",))), "blind", "doubt", "None of 2"),
    ],
)  # fmt: skip
def test_the_answer(made, answer, tone, words):
    assert (made.answer, made.tone) == (answer, tone)
    assert words in made.headline
    assert made.verdict


def test_flags_say_what_limits_it():
    transfer = findings("transfer", ("s0",), transfers=True)
    made = certificate(transfer, findings(), traces=(SHOWS,))
    names = {flag.name: flag for flag in made.flags}
    assert set(names) == {"blind", "masked", "few_controls", "betrayed"}
    assert made.masked == ("s0",)
    assert "s1" in names["betrayed"].text
    assert "66 %" in names["few_controls"].text  # 0 of 2
    found = certificate(transfer, findings(back=("s0",)), planted=None)
    assert {flag.name for flag in found.flags} == {"no_planted", "few_controls"}


def test_doors_have_a_row_each_and_say_up_to_where_they_count():
    made = certificate(
        findings("one"), findings("two", ("s1",), controls=("c0",)), findings("three", ("s1",))
    )
    table = door_table(made)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["two"]["counts"] == "up to little"
    assert rows["two"]["suspected images"] == "0 of 2"
    assert rows["three"]["suspected images"] == "1 of 2"
    assert rows["three"]["controls"] == "0 of 2"
    assert rows["three"]["its adversary holds"] == "the text embedding's input"


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    made = certificate(findings(back=("s0",)), traces=(HELD, SHOWS))
    pairs = [Pair(name, "vm", name, tmp_path / "gone.png") for name in SUSPECTS]
    page = write_certificate(made, tmp_path, pairs=pairs, images="none")
    assert read_certificate(tmp_path).attacks == made.attacks
    assert read_certificate(tmp_path).traces == made.traces
    document = json.loads((tmp_path / "certificate.json").read_text())
    assert document["first_open"] == {"s0": "dori"}
    assert document["first_work"]["suspects"] == 20
    text = page.read_text("utf-8")
    assert "refused, a door is open" in text
    assert "still held" in text
    assert "data:image" not in text


def test_certificates_are_ranked_by_the_work_until_the_first_image():
    weak = certificate(findings("one", ("s0", "s1")), mitigation="weak")
    strong = certificate(findings("one"), findings("two", ("s0",)), mitigation="strong")
    lasting = certificate(findings("one"), findings("two"), mitigation="lasting")
    table = ranking([lasting, strong, weak])
    assert [row[0] for row in table.rows] == ["weak", "strong", "lasting"]
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert [row["first back"] for row in rows] == ["20", "40", "> 40"]
    assert [row["one"] for row in rows] == ["2/2", "0/2", "0/2"]
    assert [row["+ two"] for row in rows] == ["-", "1/2", "0/2"]


def test_certificates_of_several_checkpoints_are_not_ranked():
    with pytest.raises(InputError, match="no ranking"):
        ranking([certificate(findings()), certificate(findings(), checkpoint="other")])


class Told:
    """Keeps what it is told."""

    loggers = ("any",)

    def __init__(self) -> None:
        self.curves: dict[str, float] = {}
        self.tables: dict[str, int] = {}
        self.kept: dict[str, object] = {}
        self.files: set[str] = set()

    def scalars(self, rows, *, step_metric):
        for step, values in rows:
            self.curves |= {f"{key} at {step_metric} {step}": v for key, v in values.items()}

    def image(self, event, image, *, caption):
        assert caption

    def table(self, name, rows):
        self.tables[name] = len(list(rows))

    def summary(self, values):
        self.kept |= values

    def artifact(self, name, *, files, **_):
        self.files |= set(files)


def test_loggers_get_the_curve_the_tables_and_the_files(tmp_path):
    made, told = certificate(findings(back=("s0",), planted=("p0",))), Told()
    write_certificate(made, tmp_path, pairs=[], images="none")
    track_certificate(told, made, Path(tmp_path))
    assert told.curves["certify/not_back/suspects at certify/work 20"] == 0.5
    assert told.tables == {"certify/doors": 1, "certify/levels": 2}
    assert told.kept["final/objective"] == told.kept["final/first_work"] == 20
    assert told.kept["final/planted_found"] == 1
    assert {"certificate.json", "certificate.html"} <= told.files
    assert math.isfinite(told.kept["final/seconds"])


@pytest.mark.parametrize(("recorded", "holds"), [(1, True), (2, False)])
def test_a_recorded_claim_is_held_against_certificates(tmp_path, recorded, holds):
    key = {"checkpoint": "tiny", "mitigation": "any", "attack": "dori", "group": "suspects"}
    claim = {"cell": key, "metric": "back", "value": recorded, "tol": 0}
    path = tmp_path / "expected.json"
    path.write_text(json.dumps([claim]))
    made = certificate(findings("other"), findings(back=("s0",)))
    (checked,) = check_claims(read_claims(path), (), (), doors=doors_of([made]))
    assert (checked.measured, checked.holds) == (1, holds)
    (checked,) = check_claims(read_claims(path), (), (), doors={})
    assert not checked.holds, "nothing was measured"
