# SPDX-License-Identifier: Apache-2.0
"""The open training images: nothing of a forbidden licence, of a held-out photograph or of a test emoji gets in."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress

from opendino.sample_data import icon_sets, open_emoji, openclipart
from opendino.sample_data.drawings import cut_out, is_missing_image, on_ground
from opendino.sample_data.emoji import split_of
from opendino.sample_data.licences import Ledger, open_licence, read_copyright, stanza_of
from opendino.sample_data.made_surfaces import KINDS, SIDE, make_surfaces, noise
from opendino.sample_data.open_photos import OpenPhoto, open_photos, tiles_of, write_open_tiles
from opendino.sample_data.open_rooms import open_models
from opendino.sample_data.package_pins import PACKAGES
from opendino.sample_data.photos import thumbnail_of

QUIET = Progress(disable=True)
NONE_HELD_OUT = np.zeros((0, 256))
SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "open_model"


def picture(seed=0, width=240, height=180) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def disc(colour, side=64) -> Image.Image:
    """A filled circle on nothing."""
    y, x = np.mgrid[:side, :side] - side / 2
    alpha = 255 * (np.hypot(x, y) < side * 0.4)
    return Image.fromarray(np.dstack([np.full((side, side, 3), colour), alpha]).astype(np.uint8), "RGBA")


# --- licences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("CC0", "cc0-1.0"), ("CC-BY-4.0", "cc-by-4.0"), ("Expat", "mit"), ("PD", "public-domain"),
        ("CC-BY-3.0-US", "cc-by-3.0"), ("GPL-3+ or CC-BY-3.0", "cc-by-3.0"), ("MIT and CC0", "cc0-1.0 and mit"),
        ("GPL-2+", None), ("LGPL-3", None), ("AGPL-3.0", None), ("GFDL-1.2+", None), ("CC-BY-SA-4.0", None),
        ("CC-BY-NC-4.0", None), ("CC-BY-ND-4.0", None), ("CC-BY-NC-SA-3.0", None), ("MIT and GPL-2", None),
        ("CC-BY-4.0, CC-BY-SA-4.0", None), ("GPL-2 or CC-BY-SA-3.0", None), ("Custom", None), ("", None),
        ("Free Art", None), ("BSD-3-Clause or", None),
    ],
)  # fmt: skip
def test_only_licences_on_the_list_are_open(expression, chosen):
    assert open_licence(expression) == chosen


COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: Somebody
License: GPL-3+
 Long text.
 .
 Files: not/a/field

Files: images/land/*
Copyright: 2019, Ann
           2020, Bob
License: public-domain
 Donated.

Files:
 images/land/secret*
 images/land/b.jpg
Copyright: Eve
License: CC-BY-SA-4.0
"""


def test_the_last_paragraph_that_fits_decides():
    stanzas = read_copyright(COPYRIGHT)
    assert [s.licence for s in stanzas] == ["GPL-3+", "public-domain", "CC-BY-SA-4.0"]
    assert stanza_of(stanzas, "images/land/a.jpg").holder == "2019, Ann\n2020, Bob"
    assert stanza_of(stanzas, "images/land/b.jpg").licence == "CC-BY-SA-4.0"
    assert stanza_of(stanzas, "images/other/a.jpg").licence == "GPL-3+"
    assert stanza_of(stanzas[1:], "images/other/a.jpg") is None


# --- photographs ---------------------------------------------------------------------------------------------------


def endless_sky(root: Path, names) -> dict[str, Path]:
    folder = root / "usr/share/games/endless-sky/images/land"
    folder.mkdir(parents=True)
    doc = root / "usr/share/doc/endless-sky-data"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text(COPYRIGHT)
    for seed, name in enumerate(names):
        picture(seed).save(folder / name)
    return {"endless-sky": root}


def test_a_file_of_a_forbidden_licence_cannot_get_in(tmp_path):
    raw = endless_sky(tmp_path / "package", ["a.jpg", "b.jpg", "secret1.jpg"])
    scene = tmp_path / "package/usr/share/games/endless-sky/images/scene"
    scene.mkdir()
    picture(9).save(scene / "c.jpg")  # falls under "Files: *", GPL-3+
    out = tmp_path / "out"
    out.mkdir()
    counts = write_open_tiles(list(open_photos(raw)), set(), NONE_HELD_OUT, out, QUIET)
    record = json.loads((out / "credits.json").read_text())
    assert {p.name.rsplit("_", 1)[0] for p in out.glob("*.jpg")} == {"endless-sky__a.jpg"}
    assert counts == {"photographs": 1, "tiles": len(list(out.glob("*.jpg")))}
    assert record["left_out"] == {"licence CC-BY-SA-4.0": 2, "licence GPL-3+": 1}
    assert record["credits"][0] == {
        "work": "endless-sky/a.jpg", "licence": "public-domain", "holder": "2019, Ann 2020, Bob",
        "package": "endless-sky-data",
    }  # fmt: skip


def test_a_photograph_without_a_known_licence_stays_out(tmp_path):
    photo = OpenPhoto("x/a", encoded(picture()), None, "", "p")
    assert write_open_tiles([photo], set(), NONE_HELD_OUT, tmp_path, QUIET) == {"photographs": 0, "tiles": 0}
    assert not list(tmp_path.glob("*.jpg"))


def test_held_out_photographs_and_near_copies_stay_out(tmp_path):
    held, copy = picture(1), picture(1, 480, 360)
    photos = [
        OpenPhoto("x/named", encoded(picture(2)), "CC0", "A", "p", "named"),
        OpenPhoto("x/copy", encoded(copy), "CC0", "A", "p", "copy"),
        OpenPhoto("x/new", encoded(picture(3)), "CC0", "A", "p", "new"),
        OpenPhoto("x/again", encoded(picture(3, 300, 225)), "CC0", "A", "p", "again"),
        OpenPhoto("x/even", encoded(Image.new("RGB", (200, 200), "grey")), "CC0", "A", "p", "even"),
    ]
    write_open_tiles(photos, {"named"}, thumbnail_of(held)[None], tmp_path, QUIET)
    assert {p.name.rsplit("_", 1)[0] for p in tmp_path.glob("*.jpg")} == {"x__new"}


def test_tiles_are_square_reproducible_and_more_of_a_large_photograph():
    small, large = list(tiles_of(picture(), "n")), list(tiles_of(picture(0, 900, 600), "n"))
    assert len(small) == 6
    assert len(large) == int(3 * 900 * 600 / 224**2)
    assert all(t.width == t.height <= 224 for t in small + large)
    assert [t.tobytes() for t in small] == [t.tobytes() for t in tiles_of(picture(), "n")]


# --- drawings ------------------------------------------------------------------------------------------------------


def test_a_drawing_is_cut_out_and_put_on_a_ground_that_shows_it():
    dark, light = cut_out(disc((40, 0, 0), 400)), cut_out(disc((250, 250, 250), 400))
    assert cut_out(disc((0, 0, 0), 20)) is None
    assert cut_out(Image.new("RGBA", (50, 50))) is None
    grounds = [on_ground(dark, f"d{i}", 100) for i in range(40)]
    corners = np.array([g.getpixel((0, 0)) for g in grounds])
    assert {g.size for g in grounds} == {(100, 100)}
    assert corners.min() >= 190
    assert 8 <= (corners == 255).all(1).sum() <= 32
    assert max(max(on_ground(light, f"l{i}").getpixel((0, 0))) for i in range(10)) < 110
    assert on_ground(dark, "d0", 100).tobytes() == grounds[0].tobytes()
    assert on_ground(Image.new("RGBA", (150, 10), "red"), "long", 100).size == (100, 50)


def missing_image(side=200) -> Image.Image:
    pixels = np.full((side, side, 4), 255, np.uint8)
    pixels[: int(side * 0.14), :, 1:3] = 0
    pixels[int(side * 0.14) : int(side * 0.23), :, :3] = 0
    return Image.fromarray(pixels, "RGBA")


def test_openclipart_leaves_out_logos_copies_and_missing_images(tmp_path):
    root, out = tmp_path / "package/usr/share/openclipart/png", tmp_path / "out"
    out.mkdir()
    files = {
        "animals/cat.png": disc((120, 0, 0)), "animals/cat2.png": disc((120, 0, 0)), "logos/l.png": disc((0, 0, 120)),
        "food/bread.png": missing_image(), "food/empty.png": Image.new("RGBA", (90, 90)),
    }  # fmt: skip
    for name, image in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    (root / "food/broken.png").write_bytes(b"no image")
    assert openclipart.build_openclipart({"openclipart": tmp_path / "package"}, out, QUIET) == {"images": 1}
    assert [p.name for p in out.glob("*.png")] == ["animals__cat.png"]
    assert json.loads((out / "credits.json").read_text())["left_out"] == {
        "copy": 1, "empty, tiny, too large or broken": 2, "logo": 1, "placeholder of a missing image": 1,
    }  # fmt: skip
    assert is_missing_image(missing_image())
    assert not is_missing_image(disc((255, 0, 0)))


# --- emoji and icons -----------------------------------------------------------------------------------------------


def codes(split, count=2):
    found = (f"1f{n:03x}" for n in range(0x300, 0x6FF))
    return [c for c in found if split_of(c) == split][:count]


def test_emoji_of_val_and_test_stay_out_with_all_their_tones():
    (train, _), (test, _), (val, _) = codes("train"), codes("test"), codes("val")
    entries = [
        {"unified": c.upper(), "subcategory": "hands", "sort_order": i,
         "skin_variations": {"1F3FB": {"unified": f"{c.upper()}-1F3FB"}}}
        for i, c in enumerate((train, test, val))
    ]  # fmt: skip
    assert [code for code, _ in open_emoji.train_entries(entries)] == [train, f"{train}-1f3fb"]
    chars = {"noto": {train: "wave", f"{train}-1f3fb": "wave-light", test: "clap", val: "pray", "1f999": "unlisted"}}
    assert icon_sets.train_names(chars, {"wave": {"waving"}}, entries) == {"wave", "wave-light", "waving"}
    both = {"a": {train: "hand"}, "b": {test: "hand"}}  # one name, two emoji: not safe
    assert icon_sets.train_names(both, {}, entries) == set()


def icon_package(root: Path, licence: str) -> Path:
    folder = root / "package"
    folder.mkdir(parents=True)
    body = '<circle cx="8" cy="8" r="7" fill="#c00"/>'
    (folder / "icons.json").write_text(json.dumps({"icons": {"dot": {"body": body}}, "width": 16, "height": 16}))
    (folder / "info.json").write_text(json.dumps({"license": {"spdx": licence, "title": "t"}, "author": {"name": "A"}}))
    (folder / "package.json").write_text(json.dumps({"name": "@iconify-json/x"}))
    return root


def test_an_icon_package_of_a_forbidden_licence_gives_no_image(tmp_path, monkeypatch):
    raw = {n: icon_package(tmp_path / n, lic) for n, lic in (("icons-a", "CC-BY-SA-4.0"), ("icons-b", "MIT"))}
    monkeypatch.setattr(icon_sets, "ICONS", tuple(raw))
    monkeypatch.setattr(icon_sets, "draw_all", lambda icons, wanted: ((n, disc((200, 0, 0))) for n in wanted))
    out = tmp_path / "out"
    out.mkdir()
    assert icon_sets.build_icons(raw, out, QUIET) == {"icons-a": 0, "icons-b": 1}
    assert [p.name for p in out.glob("*.png")] == ["b__dot.png"]


def test_an_icon_is_drawn(tmp_path):
    pytest.importorskip("resvg_py")
    icons = json.loads((icon_package(tmp_path / "p", "MIT") / "package/icons.json").read_text())
    ((name, image),) = icon_sets.draw_all(icons, ["dot"])
    assert name == "dot"
    assert image.getpixel((88, 88)) == (204, 0, 0, 255)
    assert image.getpixel((0, 0))[3] == 0


# --- rooms ---------------------------------------------------------------------------------------------------------


def test_furniture_of_doubtful_or_closed_licences_stays_out(tmp_path):
    libraries = tmp_path / "usr/share/sweethome3d/furniture"
    doc = tmp_path / "usr/share/doc/sweethome3d-furniture"
    doc.mkdir(parents=True)
    libraries.mkdir(parents=True)
    (doc / "copyright").write_text(
        "Files: Good/*\nCopyright: G\nLicense: CC-BY-3.0-USA\n\nFiles: Bad/*\nCopyright: B\nLicense: GPL-2+\n"
    )
    for library in ("Good", "Bad"):
        folder = tmp_path / "models" / library
        lines = []
        for n in range(6):
            (folder / str(n)).mkdir(parents=True)
            lines += [f"id#{n}={library}{n}", f"name#{n}=Chair {n}", f"category#{n}=Misc", f"model#{n}=/{n}/m.obj",
                      f"creator#{n}=C{n}", *(f"{k}#{n}=50" for k in ("width", "depth", "height"))]  # fmt: skip
        (folder / "PluginFurnitureCatalog.properties").write_text("\n".join(lines), encoding="latin1")
        (folder / "0" / "LICENSE.html").write_text("<b>Texture</b> from www.textures.com")
        (libraries / f"{library}.sh3f").write_bytes(b"")
    ledger = Ledger()
    models = open_models(tmp_path, ledger)
    assert models
    assert all(m.library == "Good" and m.id != "Good0" for m in models)
    assert {c.licence for c in ledger.credits} == {"cc-by-3.0"}
    assert ledger.refused["licence GPL-2+"] > 0
    assert {c.holder for c in ledger.credits} <= {f"C{n}" for n in range(1, 6)}


def test_surfaces_go_on_over_their_edges_and_are_made_once(tmp_path):
    paths = make_surfaces(tmp_path, 1)
    assert len(paths) == len(KINDS)
    assert Image.open(paths[0]).size == (SIDE, SIDE)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}
    assert make_surfaces(tmp_path, 1) == paths
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in paths} == before
    field = noise(np.random.default_rng(0), (4, 4), 1)
    inside = np.abs(np.diff(field, axis=0)).max()
    assert np.abs(field[0] - field[-1]).max() <= 1.01 * inside
    assert abs(field.mean()) < 1e-9


# --- the script ----------------------------------------------------------------------------------------------------


def test_the_page_of_licences_credits_every_work_and_counts_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sys.modules.pop("credits_table", None)
    from credits_table import write_licences

    ledger, folder = Ledger(), tmp_path / "rooms" / "00"
    folder.mkdir(parents=True)
    assert ledger.admits("chair", "CC-BY-4.0", "Ann", "p")
    assert not ledger.admits("sofa", "GPL-2", "Bob", "p")
    ledger.write(folder)
    (folder / ".opendino.json").write_text(json.dumps({"licences": {"p": "CC-BY"}}))
    picture().save(folder / "a.jpg")
    assert write_licences(tmp_path) == [f"{(tmp_path / 'rooms').resolve()}, 1"]
    page = (tmp_path / "LICENCES.md").read_text()
    assert "| p | cc-by-4.0 | Ann | chair |" in page
    assert "1 × licence GPL-2" in page
    assert "Bob" not in page
    summary = (tmp_path / "SUMMARY.md").read_text()
    assert "| `rooms` | 1 | p | cc-by-4.0 | 1 |" in summary
    assert "- p, CC-BY-4.0: Ann" in summary


def test_every_pin_states_a_licence_and_a_checksum():
    assert all(len(p.sha256) == 64 and p.licence and p.version for p in PACKAGES.values())
