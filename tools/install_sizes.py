"""Disk usage of the package and of each extra, measured from the installed distributions.

    python tools/install_sizes.py train onnx

The script prints the size of a plain install and the additional size of each named extra in MB, with the
largest packages. The extras must be installed in the environment that runs the script.
"""

from __future__ import annotations

import argparse
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LARGEST = 4


def requirements(name: str, extras: set[str]) -> list[Requirement]:
    """Return the requirements that a distribution with `extras` has on this machine."""
    requirements = [Requirement(text) for text in metadata.requires(name) or ()]
    environments = [{"extra": extra} for extra in (*extras, "")]
    return [r for r in requirements if r.marker is None or any(r.marker.evaluate(e) for e in environments)]


def closure(extras: set[str]) -> set[str]:
    """Return the names of jahubert and all distributions that it requires with `extras`."""
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = [("jahubert", frozenset(extras))]
    while pending:
        name, wanted = pending.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        pending += [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements(name, set(wanted))]
    return {name for name, _ in seen}


def megabytes(name: str) -> float:
    """Return the total size of a distribution's files in MB."""
    paths = [file.locate() for file in metadata.files(name) or ()]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6  # type: ignore[attr-defined]


def line(title: str, names: set[str]) -> str:
    sizes = {name: megabytes(name) for name in names}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    return f"{title:12} {sum(sizes.values()):7.0f} MB   " + ", ".join(
        f"{name} {sizes[name]:.0f}" for name in largest
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extras", nargs="*", help="installed extras")
    args = parser.parse_args()
    core = closure(set())
    print(line("(none)", core))
    for extra in args.extras:
        print(line(extra, closure({extra}) - core))


if __name__ == "__main__":
    main()
