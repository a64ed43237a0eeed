"""What may be installed: no version with a known way in, and pins that name no place."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIREMENTS = {
    requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])
}
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"

FIXED = {
    # weights_only executed code, then corrupted memory, then a loader of another format
    "torch": ("2.11", "CVE-2025-32434, CVE-2026-24747, CVE-2026-4538"),
    "lightning": ("2.6.6", "CVE-2026-31221 and classes named by checkpoints"),
    "diffusers": ("0.42.1", "CVE-2026-44513, CVE-2026-45804, GHSA-4prv-5hj7-c2xr"),
    "transformers": ("5.3", "CVE-2026-4372, CVE-2026-5241, CVE-2026-1839"),
    "hydra-core": ("1.3.7", "CVE-2026-68508, CVE-2026-106439"),
    "pillow": ("12.3", "CVE-2026-40192, PDF and JPEG 2000 bombs"),
}


@pytest.mark.parametrize("name", FIXED)
def test_no_version_with_a_known_way_in_may_be_installed(name):
    fixed, why = FIXED[name]
    floors = [
        Version(part.version) for part in REQUIREMENTS[name].specifier if part.operator == ">="
    ]
    assert floors, f"{name} has no floor"
    assert max(floors) >= Version(fixed), why


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_uploads_are_excluded_by_name(version):
    specifier = REQUIREMENTS["lightning"].specifier
    assert any(part.operator == "!=" and part.version == version for part in specifier)
    assert version not in specifier


def test_every_dependency_is_bounded():
    for requirement in REQUIREMENTS.values():
        operators = {part.operator for part in requirement.specifier}
        assert {">=", "<"} <= operators, requirement


def test_pins_are_versions_in_range_and_name_no_place():
    lines = [
        line for line in CONSTRAINTS.read_text("utf-8").splitlines() if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    optional = PROJECT["optional-dependencies"]["dev"]
    for requirement in (*REQUIREMENTS.values(), *map(Requirement, optional)):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_ci_and_make_keep_the_range_open_unless_told():
    assert re.search(r"^CONSTRAINTS \?=$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert "constraints" not in (ROOT / ".ci" / "run").read_text("utf-8").lower()


def test_the_lists_maker_sees_what_is_installed(capsys):
    scope: dict[str, object] = {"__name__": "constraints"}
    exec((ROOT / ".ci" / "constraints.py").read_text("utf-8"), scope)
    scope["main"]()
    listed = capsys.readouterr().out
    assert "\ntorch==" in listed
    assert "+" not in listed
    assert "@" not in listed
    assert sys.prefix not in listed
