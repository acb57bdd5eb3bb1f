# SPDX-License-Identifier: Apache-2.0
"""Files in the form of Meta's segmentation heads: strict loading, and outputs of a literal computation."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opendino.errors import WeightsError
from opendino.heads.published_segmentation import ADE20K, VOC2012, load_published
from opendino.heads.segmentation import Segmenter
from opendino.heads.segmentation_head import PROTOCOLS
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer

DIM = 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ViTConfig(img_size=56, patch_size=14, embed_dim=DIM, depth=5, num_heads=2, init_values=1.0)
    return VisionTransformer(config).eval()


def state_dict(blocks, classes):
    """Tensors named and shaped as in a released file, with values that make every one count."""
    g = torch.Generator().manual_seed(blocks)
    width = DIM * blocks
    return {
        "decode_head.conv_seg.weight": torch.randn(classes, width, 1, 1, generator=g),
        "decode_head.conv_seg.bias": torch.randn(classes, generator=g),
        "decode_head.bn.weight": 1 + torch.rand(width, generator=g),
        "decode_head.bn.bias": torch.randn(width, generator=g),
        "decode_head.bn.running_mean": torch.randn(width, generator=g),
        "decode_head.bn.running_var": 0.5 + torch.rand(width, generator=g),
        "decode_head.bn.num_batches_tracked": torch.tensor(40000),
    }


def write(path, state, palette=None):
    meta = {"CLASSES": tuple(VOC2012), "PALETTE": [[0, 0, 0]] if palette is None else palette, "iter": 40000}
    torch.save({"meta": meta, "state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    ("blocks", "classes", "names", "protocol"),
    [(1, 150, ADE20K, "linear"), (4, 150, ADE20K, "ms"), (1, 21, VOC2012, "linear"), (4, 21, VOC2012, "ms")],
)
def test_released_layouts_load_and_give_the_outputs_of_a_literal_computation(
    model, tmp_path, blocks, classes, names, protocol
):
    state = state_dict(blocks, classes)
    made = load_published(write(tmp_path / "head.pth", state), model)
    assert isinstance(made, Segmenter)
    assert made.classes == names
    assert made.protocol == PROTOCOLS[protocol]
    image = torch.randn(1, 3, 42, 70)
    with torch.no_grad():
        layers = model.get_intermediate_layers(image, [1, 2, 3, 4][-blocks:], reshape=True)
        x = torch.cat(layers, dim=1)
        mean, var = state["decode_head.bn.running_mean"], state["decode_head.bn.running_var"]
        x = F.batch_norm(x, mean, var, state["decode_head.bn.weight"], state["decode_head.bn.bias"], eps=1e-5)
        logits = torch.einsum("bdhw,cd->bchw", x, state["decode_head.conv_seg.weight"][:, :, 0, 0])
        logits = logits + state["decode_head.conv_seg.bias"].view(1, -1, 1, 1)
    torch.testing.assert_close(made._logits(image), logits, atol=1e-5, rtol=1e-5)


def test_predictions_are_those_of_the_stretched_logits(model, tmp_path):
    state = state_dict(1, 21)
    made = load_published(write(tmp_path / "head.pth", state), model, size=56)
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    mean, std = (np.array(v) for v in (model.preprocess.mean, model.preprocess.std))
    pixels = torch.from_numpy(((image / 255 - mean) / std).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        x = model.get_intermediate_layers(pixels, 1, reshape=True)[0]
        scale = state["decode_head.bn.weight"] / (state["decode_head.bn.running_var"] + 1e-5).sqrt()
        x = (x - state["decode_head.bn.running_mean"].view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        x = x + state["decode_head.bn.bias"].view(1, -1, 1, 1)
        x = F.conv2d(x, state["decode_head.conv_seg.weight"], state["decode_head.conv_seg.bias"])
        x = F.interpolate(x, (56, 56), mode="bilinear", align_corners=False)
    assert np.array_equal(made.predict([image])[0], x[0].argmax(0).numpy())
    np.testing.assert_allclose(made.probabilities(image), x[0].softmax(0).numpy(), atol=1e-5)


def test_a_loaded_head_can_be_saved_and_scored(model, tmp_path):
    made = load_published(write(tmp_path / "head.pth", state_dict(4, 3)), model, size=56, scales=[1.0], flip=False)
    assert made.classes == ("0", "1", "2")
    made.save(tmp_path / "head.safetensors")
    back = Segmenter.load(tmp_path / "head.safetensors", model)
    image = np.zeros((56, 70, 3), np.uint8)
    np.testing.assert_array_equal(back.probabilities(image), made.probabilities(image))
    assert back.protocol == made.protocol
    assert back.class_pixels is None


@pytest.mark.parametrize("core", ["_core", "core"])
def test_a_palette_as_a_numpy_array_is_read(model, tmp_path, core):
    path, state = tmp_path / "new.pth", state_dict(1, 21)
    meta = {"PALETTE": np.zeros((21, 3), np.uint8), "seed": np.int64(3), "CLASSES": VOC2012}
    torch.save({"meta": meta, "state_dict": state}, path)
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(tmp_path / "head.pth", "w") as old:  # numpy 2 and numpy 1
        for name in new.namelist():
            data = new.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core" in data
                data = data.replace(b"numpy._core", f"numpy.{core}".encode())
            old.writestr(name, data)
    made = load_published(tmp_path / "head.pth", model)
    torch.testing.assert_close(made.head.conv_seg.weight, state["decode_head.conv_seg.weight"])


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


def test_code_in_a_file_is_never_run(model, tmp_path):
    path = tmp_path / "head.pth"
    torch.save({"meta": {"CLASSES": Harmful()}, "state_dict": state_dict(1, 21)}, path)
    with pytest.raises(WeightsError, match="code of its own would have to run"):
        load_published(path, model)
    nested = np.array([Harmful()], dtype=object)
    torch.save({"meta": {"PALETTE": nested}, "state_dict": state_dict(1, 21)}, path)
    with pytest.raises(WeightsError):
        load_published(path, model)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(WeightsError):
        load_published(path, model)


def test_the_list_of_safe_things_is_put_back(model, tmp_path):
    before = set(map(str, torch.serialization.get_safe_globals()))
    load_published(write(tmp_path / "head.pth", state_dict(1, 21)), model)
    assert set(map(str, torch.serialization.get_safe_globals())) == before


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"decode_head.bn.bias": None}, "lacks bn.bias"),
        ({"decode_head.extra": torch.zeros(1)}, "has extra beside"),
        ({"backbone.cls_token": torch.zeros(1)}, "has backbone.cls_token beside"),
        ({"decode_head.bn.bias": torch.zeros(3)}, r"do not fit together: bn.bias \(3,\)"),
        ({"decode_head.conv_seg.weight": torch.zeros(21, DIM, 3, 3)}, r"conv_seg.weight \(21, 16, 3, 3\)"),
        ({"decode_head.pixel_decoder.x": torch.zeros(1)}, "Mask2Former"),
        ({"decode_head.query_embed.weight": torch.zeros(1)}, "Mask2Former"),
        ({"decode_head.conv_depth.weight": torch.zeros(1)}, "depth head"),
    ],
)
def test_other_files_are_refused(model, tmp_path, state, words):
    whole = {k: v for k, v in (state_dict(1, 21) | state).items() if v is not None}
    with pytest.raises(WeightsError, match=words):
        load_published(write(tmp_path / "head.pth", whole), model)


def test_a_counter_that_is_missing_is_no_harm(model, tmp_path):
    state = state_dict(1, 21)
    del state["decode_head.bn.num_batches_tracked"]
    assert load_published(write(tmp_path / "head.pth", state), model).fitted


def test_another_backbone_is_refused(model, tmp_path):
    narrow = VisionTransformer(ViTConfig(img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=2))
    path = write(tmp_path / "head.pth", state_dict(1, 21))
    with pytest.raises(WeightsError, match="takes 16 channels, but the backbone gives 24"):
        load_published(path, narrow)
    two_blocks = VisionTransformer(ViTConfig(img_size=28, patch_size=14, embed_dim=DIM, depth=2, num_heads=2))
    with pytest.raises(WeightsError, match="takes 64 channels"):
        load_published(write(tmp_path / "head.pth", state_dict(4, 21)), two_blocks)
    named = write(tmp_path / "dinov2_vits14_voc2012_linear_head.pth", state_dict(1, 21))
    with pytest.raises(WeightsError, match="belongs to vits14, but the backbone has 5 blocks of width 16"):
        load_published(named, model)
    with pytest.raises(WeightsError, match="2 names"):
        load_published(path, model, classes=["a", "b"])
    with pytest.raises(WeightsError, match="does not exist"):
        load_published(tmp_path / "nowhere.pth", model)


def test_the_file_names_blocks_must_be_those_of_its_tensors(tmp_path):
    # A +ms head of vits14 is as wide as a linear head of vitg14: only the name tells them apart.
    config = ViTConfig(img_size=28, patch_size=14, embed_dim=384, depth=12, num_heads=6)
    small = VisionTransformer(config)
    state = {k: torch.zeros(384 if v.shape[:1] == (DIM,) else v.shape[0]) if v.ndim == 1 else v
             for k, v in state_dict(1, 21).items()}  # fmt: skip
    state["decode_head.conv_seg.weight"] = torch.zeros(21, 384, 1, 1)
    state["decode_head.conv_seg.bias"] = torch.zeros(21)
    assert load_published(write(tmp_path / "dinov2_vits14_voc2012_linear_head.pth", state), small).fitted
    with pytest.raises(WeightsError, match="takes 384 channels"):
        load_published(write(tmp_path / "dinov2_vits14_voc2012_ms_head.pth", state), small)
    with pytest.raises(WeightsError, match="belongs to vitg14"):
        load_published(write(tmp_path / "dinov2_vitg14_voc2012_linear_head.pth", state), small)


def test_names_of_the_classes():
    assert len(VOC2012) == 21
    assert len(ADE20K) == len(set(ADE20K)) == 150
    assert VOC2012[15] == "person"
    assert (ADE20K[0], ADE20K[12], ADE20K[149]) == ("wall", "person", "flag")
