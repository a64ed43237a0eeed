"""Print the versions that are installed of this project's packages, as constraints for pip.

``make constraints`` writes them to ``.ci/constraints.txt``. Only what ``pyproject.toml`` asks for,
and what that asks for in turn, is listed; labels of local builds (``+cpu``) are left out, and so
are places, since a version is the same wherever it comes from.
"""

import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = "dori_lightning"
EXTRAS = ("dev", "slurm")


def installed(name: str, extras: tuple[str, ...], found: dict[str, str]) -> None:
    """Add what a package needs to ``found``, name to version; what is absent is left out."""
    for line in metadata.requires(name) or ():
        needed = Requirement(line)
        wanted = needed.marker is None or any(
            needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        key = canonicalize_name(needed.name)
        if not wanted or key in found:
            continue
        try:
            found[key] = Version(metadata.version(key)).public
        except metadata.PackageNotFoundError:
            continue
        installed(key, tuple(needed.extras), found)


def main() -> None:
    """Print the list."""
    found: dict[str, str] = {}
    installed(ROOT, EXTRAS, found)
    sys.stdout.write("# what the tests passed with; made by: make constraints\n")
    sys.stdout.writelines(f"{name}=={found[name]}\n" for name in sorted(found))


if __name__ == "__main__":
    main()
