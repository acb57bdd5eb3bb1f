# SPDX-License-Identifier: Apache-2.0
"""The segmentation head: fitting, sliding windows against a literal computation, resuming, saving, users' mistakes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from opendino.errors import ConfigError, DataError, WeightsError
from opendino.evaluate.datasets.folders import open_folder_masks
from opendino.heads.augment import Augmentation, distort, resize_mask, saturate
from opendino.heads.segmentation import Segmenter
from opendino.heads.segmentation_head import PROTOCOLS, Protocol, SegmentationHead, changed
from opendino.heads.segmentation_samples import GivenMasks, pixel_loss
from opendino.heads.training import Training, draw_rows
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer

SMALL = Protocol(blocks=1, size=28, crop=28, stride=14)
QUICK = Training(steps=30, batch_size=4, learning_rate=2e-2)
COLOURS = np.array([[220, 30, 30], [30, 30, 220], [30, 220, 30]], np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VisionTransformer(
        ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=3, num_heads=2, init_values=1.0)
    ).eval()


def coloured(seed, height=35, width=42):
    """An image of coloured rectangles, whose colour is the class."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for c in (1, 2):
        top, left = rng.integers(0, height - 14), rng.integers(0, width - 14)
        mask[top : top + 14, left : left + 14] = c
    return COLOURS[mask], mask


@pytest.fixture(scope="module")
def pictures():
    pairs = [coloured(seed) for seed in range(8)]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def segmenter(model, **settings):
    return Segmenter(model, SMALL, **{"training": QUICK, "workers": 0, **settings})


def write_set(root, pairs, split="train", classes=("red", "blue", "green")):
    for name in ("images", "masks"):
        (root / name / split).mkdir(parents=True, exist_ok=True)
    for i, (image, mask) in enumerate(pairs):
        Image.fromarray(image).save(root / "images" / split / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(classes))
    return open_folder_masks(root, split)


# --- fitting and predicting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_learns_to_tell_colours(model, pictures, features):
    # Fewer colours, because augmentation turns hues.
    made = segmenter(model, features=features, training=Training(steps=60, batch_size=4, learning_rate=2e-2))
    images, masks = pictures
    made.fit(images, masks, classes=["red", "blue", "green"])
    found = made.predict(images[:2])
    assert [f.shape for f in found] == [(35, 42)] * 2
    assert found[0].dtype == np.uint8
    assert made.losses[-1] < made.losses[0]
    constant = np.mean([(m == 0).mean() for m in masks])
    assert np.mean([(f == m).mean() for f, m in zip(found, masks[:2], strict=True)]) > constant
    assert made.class_pixels.tolist() == np.bincount(np.ravel(masks)).tolist()
    if features == "cached":
        assert made.score(images, masks) > 60


def test_paths_pil_images_and_arrays_are_one(model, pictures, tmp_path):
    made = segmenter(model).fit(*pictures)
    Image.fromarray(pictures[0][0]).save(tmp_path / "a.png")
    given = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pictures[0][0]), pictures[0][0]]
    found = made.predict(given)
    assert all(np.array_equal(f, found[0]) for f in found)


def literal_probabilities(made, image):
    """mmsegmentation's test steps, written out for one image, one window at a time."""
    model, protocol, head = made.model, made.protocol, made.head
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocess.mean, model.preprocess.std))
    height, width = image.shape[1:]
    total = 0
    for scale in protocol.scales:
        ratio = int(protocol.size * scale) / min(height, width)
        h, w = int(height * ratio + 0.5), int(width * ratio + 0.5)
        resized = F.interpolate(image[None].float(), (h, w), mode="bilinear", align_corners=False).round()[0]
        for flip in (False, True) if protocol.flip else (False,):
            pixels = (resized / 255 - mean) / std
            pixels = pixels.flip(-1) if flip else pixels
            logits, count = torch.zeros(len(made.classes), h, w), torch.zeros(h, w)
            for i in range(max(h - protocol.crop + protocol.stride - 1, 0) // protocol.stride + 1):
                for j in range(max(w - protocol.crop + protocol.stride - 1, 0) // protocol.stride + 1):
                    bottom = min(i * protocol.stride + protocol.crop, h)
                    right = min(j * protocol.stride + protocol.crop, w)
                    top, left = max(bottom - protocol.crop, 0), max(right - protocol.crop, 0)
                    window = pixels[None, :, top:bottom, left:right]
                    pad_h, pad_w = -window.shape[2] % 7, -window.shape[3] % 7
                    padded = F.pad(window, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
                    with torch.no_grad():
                        outputs = model.get_intermediate_layers(padded, protocol.blocks, reshape=True)
                        x = torch.cat(outputs, 1)
                        x = F.batch_norm(x, head.bn.running_mean, head.bn.running_var, head.bn.weight, head.bn.bias)
                        x = torch.einsum("bdhw,cd->bchw", x, head.conv_seg.weight[:, :, 0, 0])
                        x = x + head.conv_seg.bias.view(1, -1, 1, 1)
                    x = F.interpolate(x, window.shape[2:], mode="bilinear", align_corners=False)
                    logits[:, top:bottom, left:right] += x[0]
                    count[top:bottom, left:right] += 1
            logits = F.interpolate((logits / count)[None], (height, width), mode="bilinear", align_corners=False)
            probabilities = logits[0].softmax(0)
            total = total + (probabilities.flip(-1) if flip else probabilities)
    return total / (len(protocol.scales) * (2 if protocol.flip else 1))


@pytest.mark.parametrize(
    "protocol",
    [SMALL, Protocol(2, 30, 24, 17), Protocol(3, 30, 30, 15, (0.8, 1.0, 1.32), True), Protocol(1, 40, 20, 20, (1.5,))],
)
def test_probabilities_equal_a_literal_sliding_window(model, protocol):
    torch.manual_seed(1)
    made = Segmenter(model, protocol, batch_size=3)
    head = SegmentationHead(16 * protocol.blocks, 4)
    torch.nn.init.normal_(head.conv_seg.weight, std=0.3)
    head.bn.running_mean.normal_()
    head.bn.running_var.uniform_(0.5, 2)
    made.adopt(head, "abcd")
    image = torch.randint(0, 256, (3, 33, 61), dtype=torch.uint8)
    found = made.probabilities(image.permute(1, 2, 0).numpy())
    assert found.shape == (4, 33, 61)
    np.testing.assert_allclose(found, literal_probabilities(made, image), atol=2e-6)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_scores_with_a_cache_equal_those_without(model, pictures, tmp_path):
    data = write_set(tmp_path / "set", [coloured(s) for s in range(4)])
    protocol = Protocol(1, 28, 28, 14, (1.0,), True)
    made = Segmenter(model, protocol, training=QUICK, workers=0).fit(*pictures)
    plain = made.evaluate(data)
    made.cache = tmp_path / "cache"
    cached = made.evaluate(data)
    assert plain.scores.matrix.sum() == cached.scores.matrix.sum() == 4 * 35 * 42
    assert cached.scores.miou == pytest.approx(plain.scores.miou, abs=0.2)  # tokens are kept in half precision
    assert plain.images == [0, 1, 2, 3]
    truth = [coloured(s)[1] for s in range(4)]
    for value, image, mask in zip(plain.image_miou, [coloured(s)[0] for s in range(4)], truth, strict=True):
        predicted = made.predict([image])[0]
        ious = [((predicted == c) & (mask == c)).sum() / ((predicted == c) | (mask == c)).sum() for c in range(3)]
        assert value == pytest.approx(100 * np.mean(ious))


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.3)])
def test_a_stopped_evaluation_goes_on(model, pictures, tmp_path, scales, monkeypatch):
    data = write_set(tmp_path / "set", [coloured(s) for s in range(4)])
    made = segmenter(model, cache=tmp_path / "cache", scales=scales).fit(*pictures)

    def stop(stage, done, total, note):
        if stage == "score" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.evaluate(data, stop)
    predicted = []
    for name in ("_probabilities", "_from_tokens"):
        whole = getattr(Segmenter, name)
        monkeypatch.setattr(Segmenter, name, lambda *a, f=whole: (predicted.append(1), f(*a))[1])
    result = made.evaluate(data)
    assert len(predicted) == 1
    made.cache = None
    assert made.evaluate(data).scores.miou == pytest.approx(result.scores.miou, abs=0.2)


# --- training --------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    logits = torch.tensor([[[[2.0]], [[0.0]]]])
    targets = torch.tensor([[[0, 0], [1, 255]]], dtype=torch.uint8)
    p = 1 / (1 + np.exp(-2))
    assert float(pixel_loss(logits, targets)) == pytest.approx(-(2 * np.log(p) + np.log(1 - p)) / 3)
    assert float(pixel_loss(logits, torch.full((1, 2, 2), 255, dtype=torch.uint8))) == 0


def test_rate_is_the_published_schedule():
    published = Training(steps=40000)
    assert published.rate(0) == pytest.approx(1e-3 * 1e-6)
    assert published.rate(750) == pytest.approx(1e-3 * (1 - 750 / 40000) * 0.5, rel=1e-5)
    assert published.rate(1500) == pytest.approx(1e-3 * (1 - 1500 / 40000))
    assert published.rate(39999) == pytest.approx(1e-3 / 40000)
    assert Training(steps=400).rate(15) == pytest.approx(1e-3 * (1 - 15 / 400))


def test_each_epoch_holds_every_sample_once_in_another_order():
    rows = [r for step in range(7) for r in draw_rows(10, 3, step, 0)]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows[:10] != rows[10:20]
    assert draw_rows(10, 3, 5, 0) == rows[15:18]
    assert draw_rows(10, 3, 5, 1) != rows[15:18]
    assert len(draw_rows(2, 5, 0, 0)) == 5


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_a_killed_training_ends_with_the_same_bits(model, pictures, features, tmp_path, monkeypatch):
    monkeypatch.setattr("opendino.heads.training.SAVE_EVERY", 3)
    training = Training(steps=8, batch_size=3)
    whole = segmenter(model, features=features, training=training).fit(*pictures)

    def stop(stage, done, total, note):
        if stage == "train" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segmenter(model, features=features, training=training).fit(
            *pictures, state=tmp_path / "state.pt", on_progress=stop
        )
    assert (tmp_path / "state.pt").exists()
    steps = []
    resumed = segmenter(model, features=features, training=training).fit(
        *pictures, state=tmp_path / "state.pt", on_progress=lambda stage, done, *_: steps.append((stage, done))
    )
    assert [done for stage, done in steps if stage == "train"] == [4, 5, 6, 7, 8]
    assert resumed.losses == whole.losses
    for name, value in whole.head.state_dict().items():
        assert torch.equal(value, resumed.head.state_dict()[name]), name


def test_a_state_of_another_run_is_refused(model, pictures, tmp_path):
    state = tmp_path / "state.pt"
    segmenter(model).fit(*pictures, state=state)
    with pytest.raises(ConfigError, match="other settings, images or weights"):
        segmenter(model, training=Training(steps=31)).fit(*pictures, state=state)
    with pytest.raises(ConfigError, match="other settings, images or weights"):
        segmenter(model).fit(pictures[0][1:], pictures[1][1:], state=state)
    state.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no saved state"):
        segmenter(model).fit(*pictures, state=state)


def test_workers_and_batches_of_the_backbone_do_not_change_the_head(model, pictures):
    one = segmenter(model, batch_size=1).fit(*pictures)
    other = segmenter(model, batch_size=5, workers=3).fit(*pictures)
    torch.testing.assert_close(one.head.conv_seg.weight, other.head.conv_seg.weight, atol=2e-2, rtol=0)
    again = segmenter(model, batch_size=5, workers=1).fit(*pictures)
    assert torch.equal(again.head.conv_seg.weight, other.head.conv_seg.weight)


def test_mirrored_images_double_the_samples(model, pictures):
    made = segmenter(model, mirror=True)
    found = []
    tokens = made._token_set(GivenMasks(*pictures), made.protocol.views(flip=True)).compute()
    plain = made._token_set(GivenMasks(*pictures), made.protocol.views()).compute()
    assert len(tokens) == 2 * len(plain)
    made.fit(*pictures, on_progress=lambda stage, done, total, note: found.append((stage, done, total)))
    assert {stage for stage, _, _ in found} == {"masks", "tokens", "train"}
    assert ("train", 30, 30) in found


def test_balance_is_a_shift_of_the_bias_by_the_log_of_the_shares(model, pictures):
    images, masks = pictures
    names = ["red", "blue", "green", "nowhere"]
    plain = segmenter(model).fit(images, masks, classes=names)
    made = segmenter(model, balance=0.5).fit(images, masks, classes=names)
    counts = np.bincount(np.ravel(masks))
    expected = plain.head.conv_seg.bias.detach()[:3] - 0.5 * torch.tensor(np.log(counts / counts.sum()))
    torch.testing.assert_close(made.head.conv_seg.bias.detach()[:3], expected.float())
    assert torch.equal(made.head.conv_seg.weight, plain.head.conv_seg.weight)
    found, before = np.ravel(made.predict(images)), np.ravel(plain.predict(images))
    assert (found == 0).sum() < (before == 0).sum()
    assert not (found == 3).any()
    with pytest.raises(ConfigError, match="balance is 2"):
        segmenter(model, balance=2)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_augmented_samples_follow_their_generator_alone():
    image, mask = coloured(0)
    way = Augmentation(size=28, crop=21)

    def draw(seed):
        rng = np.random.default_rng(seed)
        return way(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask), rng)

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (3, 21, 21)
    assert first[0].dtype == torch.uint8


def test_small_images_are_padded_below_and_right_with_ignored_pixels():
    image, mask = torch.full((3, 20, 30), 100, dtype=torch.uint8), torch.zeros(20, 30, dtype=torch.uint8)
    _, target, inside = Augmentation(size=20, crop=28, ratios=(0.5, 0.5))(image, mask, np.random.default_rng(0))
    assert inside[:10, :15].all()
    assert inside.sum() == 150
    assert torch.equal(target == 255, ~inside)


def test_image_and_mask_move_together():
    image, mask = coloured(3, 60, 60)
    for seed in range(10):
        way = Augmentation(size=60, crop=40, ratios=(1, 1))
        rng = np.random.default_rng(seed)
        pixels, target, _ = way(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask), rng)
        # Colours change for the whole image, so each class still has one colour and two classes never share one.
        seen = {int(c): pixels[:, target == c].unique(dim=1) for c in target.unique()}
        assert all(colour.shape[1] == 1 for colour in seen.values())


def test_a_crop_of_one_class_is_drawn_again():
    mask = torch.zeros(100, 100, dtype=torch.uint8)
    mask[:, 70:] = 1
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    way = Augmentation(size=100, crop=40, ratios=(1, 1))
    mixed = 0
    for seed in range(40):
        target = way(image, mask, np.random.default_rng(seed))[1]
        mixed += 0.25 < float(target.float().mean()) < 0.75
    # One draw shows 25 to 75 % of class 1 at 20 of 61 places: a third; of ten draws nearly always one does.
    assert mixed > 32


def test_saturation_is_that_of_hsv():
    import colorsys

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 1, 40), dtype=np.uint8)
    pixels[:, 0, :4] = [[0, 255, 128, 7]] * 3
    for factor in (0.5, 1.3, 5.0):
        found = saturate(torch.from_numpy(pixels), factor)
        for i in range(40):
            h, s, v = colorsys.rgb_to_hsv(*(pixels[:, 0, i] / 255))
            expected = 255 * np.array(colorsys.hsv_to_rgb(h, min(s * factor, 1), v))
            np.testing.assert_allclose(found[:, 0, i], expected, atol=0.51)


def test_colours_are_changed_half_of_the_time():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)  # hue and saturation leave grey alone
    means = np.array([float(distort(grey, np.random.default_rng(s)).float().mean()) for s in range(400)])
    assert (means == 100).mean() == pytest.approx(0.25, abs=0.07)  # neither brightness nor contrast
    assert means.min() >= np.floor(0.5 * 68) - 1
    assert means.max() <= 1.5 * 132 + 1


def test_masks_are_resized_to_the_nearest_pixel():
    mask = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    assert resize_mask(mask, (4, 4)).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 255, 255]] * 2


# --- protocols and files ---------------------------------------------------------------------------------------------


def test_published_protocols():
    assert PROTOCOLS["linear"] == Protocol(1, 512, 512, 341, (1.0,), False, (0.5, 2.0))
    assert PROTOCOLS["ms"] == Protocol(4, 640, 640, 320, (1.0, 1.32, 1.73, 2.28, 3.0), True, (1.0, 3.0))
    assert changed(PROTOCOLS["linear"], size=224) == Protocol(1, 224, 224, 149)
    assert changed(PROTOCOLS["ms"], size=320, scales=[1], flip=False, blocks=2) == Protocol(
        2, 320, 320, 160, (1,), False, (1.0, 3.0)
    )


def test_saved_heads_come_back(model, pictures, tmp_path):
    made = segmenter(model, blocks=2, mirror=True, balance=0.3).fit(*pictures, classes=["red", "blue", "green"])
    made.save(tmp_path / "head.safetensors")
    back = Segmenter.load(tmp_path / "head.safetensors", model)
    assert back.classes == ("red", "blue", "green")
    assert back.protocol == made.protocol
    assert back.training == made.training
    np.testing.assert_array_equal(back.class_pixels, made.class_pixels)
    np.testing.assert_array_equal(back.probabilities(pictures[0][0]), made.probabilities(pictures[0][0]))
    torch.manual_seed(5)
    other = VisionTransformer(model.config)
    with pytest.raises(WeightsError, match="Give the same backbone"):
        Segmenter.load(tmp_path / "head.safetensors", other)


# --- users' mistakes -------------------------------------------------------------------------------------------------


def test_a_mask_with_unknown_values_is_an_error(model, pictures, tmp_path):
    images, masks = pictures
    wrong = [*masks[:-1], np.full_like(masks[-1], 7)]
    with pytest.raises(DataError, match=r"image 7 holds the values \[7\], but there are 3 classes"):
        segmenter(model).fit(images, wrong, classes=["red", "blue", "green"])
    data = write_set(tmp_path, [(images[0], masks[0]), (images[1], wrong[-1])])
    with pytest.raises(DataError, match=r"1.png holds the values \[7\]"):
        segmenter(model).fit(data)
    with pytest.raises(DataError, match=r"1.png holds the values \[7\]"):
        segmenter(model).fit(images, masks).evaluate(data)


def test_a_mask_of_another_size_is_an_error(model, pictures, tmp_path):
    images, masks = pictures
    small = [*masks[:-1], masks[-1][:30]]
    for features in ("cached", "augmented"):
        with pytest.raises(DataError, match="image 7"):
            segmenter(model, features=features).fit(images, small)
    data = write_set(tmp_path, [(images[0], masks[0][:, :30])])
    with pytest.raises(DataError, match=r"0.png has the shape"):
        segmenter(model).fit(images, masks).evaluate(data)


def test_unreadable_images_are_left_out_and_counted(model, pictures, tmp_path):
    data = write_set(tmp_path, [coloured(s) for s in range(5)])
    (tmp_path / "images/train/2.png").write_bytes(b"no image")
    for features in ("cached", "augmented"):
        made = segmenter(model, features=features, cache=tmp_path / "cache").fit(data)
        assert list(made.errors) == [2]
        assert "2.png" in made.errors[2]
        result = made.evaluate(data)
        assert list(result.errors) == [2]
        assert result.images == [0, 1, 3, 4]
    for path in (tmp_path / "images/train").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="No image of"):
        segmenter(model).fit(data)
    with pytest.raises(DataError, match="No image of"):
        made.evaluate(data)


def test_classes_without_a_training_pixel_are_never_predicted_and_count_zero(model, pictures):
    images, masks = pictures
    without = [np.where(m == 2, 255, m).astype(np.uint8) for m in masks]
    made = segmenter(model).fit(images, without, classes=["red", "blue", "green", "nowhere"])
    assert made.class_pixels[2:].tolist() == [0, 0]
    scores = made.evaluate(GivenMasks(images, masks, made.classes)).scores
    assert scores.iou[2] == 0
    assert scores.absent == [3]
    assert scores.miou == pytest.approx(scores.iou[:3].mean())


def test_mistakes_are_named(model, pictures, tmp_path):
    with pytest.raises(ConfigError, match="no head yet"):
        segmenter(model).predict([pictures[0][0]])
    with pytest.raises(ConfigError, match="no head yet"):
        segmenter(model).save(tmp_path / "x")
    with pytest.raises(ConfigError, match="linear or ms"):
        Segmenter(model, "m2f")
    with pytest.raises(ConfigError, match="the model has 3"):
        Segmenter(model, "ms")
    with pytest.raises(ConfigError, match="cached or augmented"):
        segmenter(model, features="fast")
    with pytest.raises(ConfigError, match="loss_scale is 8"):
        segmenter(model, loss_scale=8)
    with pytest.raises(ConfigError, match="stride ≤ crop ≤ size"):
        Protocol(size=20, crop=30)
    with pytest.raises(ConfigError, match="scales"):
        Protocol(scales=())
    with pytest.raises(ConfigError, match="steps is 0"):
        Training(steps=0)
    with pytest.raises(ConfigError, match="learning_rate"):
        Training(learning_rate=0)
    made = segmenter(model).fit(*pictures)
    with pytest.raises(DataError, match="needs a list"):
        made.predict("a.jpg")
    with pytest.raises(DataError, match="each image needs one mask"):
        made.fit(pictures[0], pictures[1][1:])
    with pytest.raises(DataError, match="give integers"):
        made.fit(pictures[0], [m.astype(float) for m in pictures[1]])
    with pytest.raises(DataError, match="all are 255"):
        made.fit(pictures[0], [np.full_like(m, 255) for m in pictures[1]])
    with pytest.raises(DataError, match="3 classes and the head 2"):
        segmenter(model).adopt(SegmentationHead(16, 2), "ab").evaluate(GivenMasks(*pictures, "abc"))
    with pytest.raises(DataError, match="not finite"):
        segmenter(model, training=Training(steps=40, learning_rate=1e38)).fit(*pictures)
