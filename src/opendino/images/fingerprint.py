# SPDX-License-Identifier: Apache-2.0
"""What a run remembers of its data, so that a resume on another list of images does not go unseen."""

from __future__ import annotations

from typing import Any

from opendino.images.sources import ImageSource


def fingerprint(source: ImageSource) -> dict[str, Any]:
    """Give what `explain_change` compares: number and names of the images, not their pixels.

    The same data in another place have the same fingerprint. A file that a list names and that is gone changes
    nothing; it is an unreadable image of that list.

    Returns:
        images: their number; names: hash of all names in order; some: [[index, name], …]; root: what was opened. Plain
        values, fit for JSON.
    """
    # Places that lists of different lengths share, closer together at the beginning.
    places = [2**k - 1 for k in range(len(source).bit_length())]
    return {
        "images": len(source),
        "names": source.names_hash(),
        "some": [[i, source.short_name(i)] for i in places if i < len(source)],
        "root": source.root,
    }


def explain_change(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Say in one paragraph how the list of images has changed since a checkpoint; None when it has not.

    Args:
        old: fingerprint in the checkpoint.
        new: fingerprint of the source as it is now.
    """
    if (old["images"], old["names"]) == (new["images"], new["names"]):
        return None
    difference = new["images"] - old["images"]
    more = "more" if difference > 0 else "fewer"
    if difference:
        change = f"it had {old['images']} images and has {new['images']}, {abs(difference)} {more}"
    else:
        change = f"it has {new['images']} images as before, but of other names or in another order"
    before, now = dict(map(tuple, old["some"])), dict(map(tuple, new["some"]))
    parted = next((i for i in sorted(before) if i in now and before[i] != now[i]), None)
    if parted is not None:
        change += f" (number {parted} was {before[parted]} and is {now[parted]})"
    elsewhere = f" (opened as {old['root']} before)" if old["root"] != new["root"] else ""
    return (
        f"The list of images in {new['root']}{elsewhere} has changed since the checkpoint was written: {change}. The "
        "run would go on with images in another order, some twice and some never. Bring the old files back, or name "
        "the old list in a .txt (what is gone is then replaced and counted), or start a new run in another --out."
    )
