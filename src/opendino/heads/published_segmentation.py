# SPDX-License-Identifier: Apache-2.0
"""Meta's released segmentation heads: `dinov2_vit{s,b,l,g}14_{ade20k,voc2012}_{linear,ms}_head.pth`.

A file holds {"meta", "state_dict"}; the tensors are `decode_head.bn.{weight,bias,running_mean,running_var,
num_batches_tracked}` of width L·D and `decode_head.conv_seg.{weight (C, L·D, 1, 1),bias}`: L = 1 for linear, 4 for ms.
The Mask2Former model (`dinov2_vitg14_ade20k_m2f.pth`) is another architecture and is not read.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opendino.errors import WeightsError
from opendino.heads.segmentation import Segmenter
from opendino.heads.segmentation_head import SegmentationHead
from opendino.models.files import read_weights
from opendino.models.registry import MODELS
from opendino.models.vit import VisionTransformer

PREFIX = "decode_head."
NAME = re.compile(r"dinov2_(vit[sblg]14)_(ade20k|voc2012)_(linear|ms)_head")
TRACKED = "bn.num_batches_tracked"

_VOC2012 = """
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
    person, pottedplant, sheep, sofa, train, tvmonitor
"""
_ADE20K = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest
    of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool
    table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus,
    towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
    apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer
    belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle,
    oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board,
    shower, radiator, glass, clock, flag
"""
VOC2012 = tuple(name.strip() for name in _VOC2012.split(","))
"""Classes of the VOC heads, by index."""
ADE20K = tuple(name.strip() for name in _ADE20K.split(","))
"""Classes of the ADE20k heads, by index; a mask of the challenge holds the index + 1, and 0 where it does not count."""
CLASSES = {len(names): names for names in (VOC2012, ADE20K)}


def load_published(
    path: str | Path,
    backbone: VisionTransformer | str | Path,
    *,
    classes: Sequence[str] | None = None,
    **settings: Any,
) -> Segmenter:
    """Read one of Meta's segmentation heads, or a head of the same form that mmsegmentation trained.

    Args:
        path: of the .pth file.
        backbone: the model that the head was trained on, such as "vits14".
        classes: names; default: those of VOC for 21 classes and of ADE20k for 150, else numbers.
        settings: size, scales, flip, cache, batch_size, … as for `Segmenter`.

    Returns:
        A Segmenter with the protocol of the head: "linear" for one block, "ms" for several.

    Raises:
        WeightsError: for a damaged file, one that would have to run code, a head of another kind, or another backbone.
    """
    path = Path(path)
    state = _head_state(path)
    made = Segmenter(backbone, "linear", **settings)
    blocks = _blocks(path, state["bn.weight"].shape[0], made.model)
    if blocks > 1:
        made = Segmenter(made.model, "ms", blocks=blocks, **{"name": made.name} | settings)
    count = state["conv_seg.bias"].shape[0]
    names = tuple(classes or CLASSES.get(count) or map(str, range(count)))
    if len(names) != count:
        raise WeightsError(f"{path} has {count} classes, but {len(names)} names were given.")
    head = SegmentationHead(state["bn.weight"].shape[0], count)
    head.load_state_dict(state)
    return made.adopt(head, names)


def _head_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of the head, all of them and no others, in fp32."""
    # mmsegmentation keeps a palette in `meta`, at times as a numpy array; rebuilding arrays of numbers runs no code.
    with torch.serialization.safe_globals(_numpy_parts()):
        found = read_weights(path).state
    if any("mask2former" in k or k.startswith(PREFIX + w) for k in found for w in ("pixel_decoder", "query_embed")):
        raise WeightsError(
            f"{path} is a Mask2Former model: a pixel decoder and a transformer decoder on an adapted backbone. Only "
            "linear and multi-scale heads are read here: give dinov2_…_ade20k_linear_head.pth or …_ms_head.pth."
        )
    if any(k.startswith(PREFIX + "conv_depth") for k in found):
        raise WeightsError(f"{path} is a depth head, not one for segmentation. Load it as a DepthEstimator.")
    state = {k.removeprefix(PREFIX): v if k.endswith(TRACKED) else v.float() for k, v in found.items()}
    expected = set(SegmentationHead(1, 1).state_dict())
    state.setdefault(TRACKED, torch.tensor(0))
    if set(state) != expected:
        missing, unused = sorted(expected - set(state)), sorted(set(state) - expected)
        raise WeightsError(
            f"{path} is no linear segmentation head: it lacks {', '.join(missing[:5]) or 'nothing'} and has "
            f"{', '.join(unused[:5]) or 'nothing'} beside the tensors of one ({PREFIX}bn and {PREFIX}conv_seg)."
        )
    like = SegmentationHead(state["bn.weight"].shape[0], state["conv_seg.bias"].shape[0]).state_dict()
    wrong = [f"{k} {tuple(v.shape)}" for k, v in state.items() if v.shape != like[k].shape]
    if wrong:
        raise WeightsError(f"{path} has tensors whose shapes do not fit together: {', '.join(wrong)}.")
    return state


def _blocks(path: Path, width: int, model: VisionTransformer) -> int:
    """Give the number of blocks that a head of this width is for, if the backbone can be the right one."""
    named = NAME.search(path.name)
    if named is not None:
        config = MODELS[named[1]].config
        same = (config.embed_dim, config.depth) == (model.embed_dim, model.n_blocks)
        if not same or model.num_register_tokens:
            raise WeightsError(
                f"{path} belongs to {named[1]}, but the backbone has {model.n_blocks} blocks of width "
                f"{model.embed_dim} and {model.num_register_tokens} registers. Give --model "
                f"{named[1]}, or the head of your backbone."
            )
    blocks, rest = divmod(width, model.embed_dim)
    if rest or not 1 <= blocks <= model.n_blocks or (named is not None and (blocks > 1) != (named[3] == "ms")):
        raise WeightsError(
            f"{path} takes {width} channels, but the backbone gives {model.embed_dim} from each of {model.n_blocks} "
            "blocks. Give the backbone that the head was trained on."
        )
    return blocks


def _numpy_parts() -> list[Any]:
    """What a pickled array of numbers is made of, under the names that old and new numpy write."""
    multiarray: Any = (getattr(np, "_core", None) or np.core).multiarray
    parts: list[Any] = [np.ndarray, np.dtype, codecs.encode]
    parts += [type(np.dtype(kind)) for kind in ("u1", "i4", "i8", "f4", "f8")]
    for name in ("_reconstruct", "scalar"):
        parts += [_named(f"numpy.{core}.multiarray", name, getattr(multiarray, name)) for core in ("core", "_core")]
    return parts


def _named(module: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that torch's list of safe things knows as `module.name`; older torch takes no other names."""

    def called(*args: Any) -> Any:
        return function(*args)

    called.__module__, called.__name__, called.__qualname__ = module, name, name
    return called
