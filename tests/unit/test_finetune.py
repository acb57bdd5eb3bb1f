# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: what trains, at which rate, on which images; the probe to beat; kills; the files that come out."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import opendino
from opendino.cli import finetune as command
from opendino.errors import ConfigError, DataError, MissingExtraError
from opendino.evaluate.datasets.folders import open_folder_masks
from opendino.finetune.adapters import merge_lora, parameter_groups, prepare, trainable
from opendino.finetune.augment import Cut, cut_image, cut_mask, draw_cut
from opendino.finetune.probe import class_shares, fit_shares, probe_classes, probe_pixels
from opendino.finetune.settings import FLOOR, FinetuneSettings, learning_rate
from opendino.finetune.storage import read_linear, write_head
from opendino.finetune.tasks import Classification, Segmentation
from opendino.finetune.trainer import open_run, train, write_result
from opendino.images.preprocess import Preprocess
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

SPEC = PreprocessSpec(resize=28, crop=28)


def backbone(seed=0, **fields):
    torch.manual_seed(seed)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2, "init_values": 0.5}
    return VisionTransformer(ViTConfig(**shape | fields), SPEC).eval()


# --- rates and settings ----------------------------------------------------------------------------------------------


def test_learning_rate_by_hand():
    rates = [learning_rate(s, total_steps=11, peak=1.0, warmup=0.2) for s in range(11)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(FLOOR + (1 - FLOOR) / 2)
    assert rates[10] == pytest.approx(FLOOR)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 1000])
def test_no_schedule_switches_training_off(total, warmup):
    rates = [learning_rate(s, total_steps=total, peak=2e-4, warmup=warmup) for s in range(total)]
    assert min(rates) >= FLOOR * 2e-4 * (1 - 1e-12)
    assert max(rates) == pytest.approx(2e-4)
    assert np.mean(rates) > 0.3 * 2e-4


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "lorra"}, {"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": 1.5}, {"layer_decay": 0.0},
     {"warmup": 1.0}, {"drop_path": -0.1}, {"min_scale": 0.0}, {"weight_decay": -1.0}, {"head_init": "best"},
     {"lora_rank": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="--" + next(iter(wrong)).split("_")[0]):
        FinetuneSettings(**wrong)


# --- what trains -----------------------------------------------------------------------------------------------------


def test_what_trains_in_each_mode():
    def names(**settings):
        model = backbone()
        prepare(model, FinetuneSettings(**settings))
        return set(trainable(model))

    everything = set(dict(backbone().named_parameters()))
    assert names(mode="frozen") == set()
    assert names(mode="full") == everything - {"mask_token"}
    assert names(mode="last-k", last_k=1) == {n for n in everything if n.startswith(("blocks.2.", "norm."))}
    adapters = names(mode="lora")
    assert len(adapters) == 3 * 2 * 2
    assert all("lora_" in n and (".qkv." in n or ".proj." in n) for n in adapters)
    assert len(names(mode="lora", lora_mlp=True)) == 3 * 4 * 2
    with pytest.raises(ConfigError, match="3 blocks"):
        names(mode="last-k", last_k=4)


@pytest.mark.parametrize("fields", [{}, {"ffn": "swiglu"}, {"init_values": None}])
def test_gradients_reach_every_adapter_and_merging_keeps_the_outputs(fields):
    model, images = backbone(**fields), torch.randn(2, 3, 28, 28)
    before, keys = model(images), list(model.state_dict())
    prepare(model, FinetuneSettings(mode="lora", lora_mlp=True, lora_rank=4))
    torch.testing.assert_close(model(images), before, atol=0, rtol=0)  # adapters start at no effect
    for _ in range(2):  # the first step moves B away from 0, then A has a gradient
        model.train()
        model(images).square().sum().backward()
        with torch.no_grad():
            for p in trainable(model).values():
                assert p.grad is not None
                p -= 0.5 * p.grad / p.grad.norm().clamp(min=1e-9)
    assert all(p.grad.abs().sum() > 0 for p in trainable(model).values())
    in_training = model(images)
    model.eval()
    tuned = model(images)
    torch.testing.assert_close(in_training, tuned, atol=1e-5, rtol=1e-5)
    assert (tuned - before).abs().max() > 1e-2
    merged = merge_lora(model)
    assert list(merged.state_dict()) == keys
    torch.testing.assert_close(merged(images), tuned, atol=1e-5, rtol=0)


def test_adapters_are_drawn_from_the_seed_and_leave_the_global_generator_alone():
    def first(seed):
        model = backbone()
        torch.manual_seed(5)
        prepare(model, FinetuneSettings(mode="lora", seed=seed))
        return torch.rand(1).item(), next(iter(trainable(model).values())).detach().clone()

    (a, x), (b, y), (_, z) = first(1), first(1), first(2)
    torch.manual_seed(5)
    assert a == b == torch.rand(1).item()
    assert torch.equal(x, y)
    assert not torch.equal(x, z)


def test_lora_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"opendino\[finetune\]"):
        prepare(backbone(), FinetuneSettings(mode="lora"))


def test_rates_fall_from_layer_to_layer_and_vectors_have_no_decay():
    model, head = backbone(), torch.nn.Linear(16, 2)
    settings = FinetuneSettings(mode="full", layer_decay=0.5, head_lr_mult=3.0, weight_decay=0.1)
    prepare(model, settings)
    groups = parameter_groups(model, head, settings)
    rate = {name: g["lr_multiplier"] for g in groups for name in g["names"]}
    expected = {"norm.weight": 1, "blocks.2.norm1.bias": 0.5, "blocks.0.mlp.fc1.weight": 0.125, "cls_token": 0.0625,
                "patch_embed.proj.weight": 0.0625}  # fmt: skip
    assert {name: rate[f"backbone.{name}"] for name in expected} == expected
    assert rate["head.weight"] == 3
    decay = {name: g["weight_decay"] for g in groups for name in g["names"]}
    assert {decay[n] for n in decay if n.endswith((".bias", ".gamma", "norm1.weight"))} == {0}
    assert decay["backbone.blocks.1.attn.qkv.weight"] == 0.1
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(trainable(model)) + 2


# --- images ----------------------------------------------------------------------------------------------------------


def test_cuts_are_in_the_image_and_a_function_of_seed_epoch_and_sample():
    settings = FinetuneSettings(min_scale=0.5)
    cuts = [draw_cut(40, 60, settings, 0, i) for i in range(400)]
    assert cuts == [draw_cut(40, 60, settings, 0, i) for i in range(400)]
    assert len({*cuts, *(draw_cut(40, 60, settings, 1, i) for i in range(400))}) > 600
    assert all(c.top >= 0 and c.left >= 0 and c.top + c.height <= 40 and c.left + c.width <= 60 for c in cuts)
    shares = [c.height * c.width / 2400 for c in cuts]
    assert max(shares) <= 1
    assert np.mean(shares) > 0.6
    assert 150 < sum(c.flip for c in cuts) < 250
    assert not any(draw_cut(40, 60, FinetuneSettings(flip=False), 0, i).flip for i in range(50))


@pytest.mark.parametrize("flip", [False, True])
def test_masks_are_cut_with_their_image(flip):
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[5:22, 33:] = 1
    cut = Cut(2, 20, 30, 38, flip)
    image = cut_image(mask.mul(200).expand(3, -1, -1), cut, (30, 38), SPEC)  # no resizing: pixel by pixel
    expected = mask[2:32, 20:58].long()
    expected = expected.flip(-1) if flip else expected
    assert torch.equal(cut_mask(mask, cut, (30, 38)), expected)
    mean, std = torch.tensor(SPEC.mean).view(3, 1, 1), torch.tensor(SPEC.std).view(3, 1, 1)
    torch.testing.assert_close(image * std + mean, expected.expand(3, -1, -1) * 200 / 255, atol=1e-6, rtol=0)
    small = cut_mask(mask, cut, (15, 19))
    assert set(small.unique().tolist()) == {0, 1}


def class_folders(root, n, seed=0, classes=("rows", "columns", "plain")):
    """Stripes that lie, stripes that stand, and grey."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(n):
            wave = 90 * np.sign(np.sin(np.arange(32) * rng.uniform(0.6, 1.2) + rng.uniform(0, 6)))
            grid = {"rows": wave[:, None], "columns": wave[None], "plain": np.zeros((1, 1))}[name]
            pixels = 120 + np.broadcast_to(grid, (32, 32))[..., None] + rng.normal(0, 12, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    root = tmp_path_factory.mktemp("stripes")
    class_folders(root / "train", 8)
    class_folders(root / "val", 4, seed=1)
    save_backbone(backbone(), root / "model.safetensors")
    return root


def classification(root, workers=0):
    train_set, val = open_source(root / "train"), open_source(root / "val")
    labels = [np.array(s.labels, dtype=np.int64) for s in (train_set, val)]
    return Classification(
        list(train_set.images()), labels[0], list(val.images()), labels[1], train_set.classes, Preprocess(SPEC), workers
    )


def test_batches_do_not_depend_on_workers_and_can_begin_anywhere(stripes):
    settings = FinetuneSettings(batch_size=5)
    whole = list(classification(stripes).batches(3, 0, settings))
    assert [len(b[0]) for b in whole] == [5, 5, 5, 5, 4]
    assert sorted(torch.cat([t for _, t in whole]).tolist()) == sorted(open_source(stripes / "train").labels)
    rest = list(classification(stripes, workers=3).batches(3, 2, settings))
    for (x, y), (a, b) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    other = next(iter(classification(stripes).batches(4, 0, settings)))
    assert not torch.equal(other[0], whole[0][0])


# --- probe and scores ------------------------------------------------------------------------------------------------


def test_probe_of_classes_is_the_best_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    y, val_y = np.arange(60) % 3, np.arange(90) % 3
    centre = rng.normal(size=(3, 8))
    x, val_x = centre[y] + rng.normal(size=(60, 8)), centre[val_y] + rng.normal(size=(90, 8))
    got = probe_classes(x, y, val_x, val_y, 3)
    scores = {}
    for c in (0.01, 0.1, 1.0, 10.0):
        scores[c] = 100 * LogisticRegression(C=c, max_iter=1000, tol=1e-8).fit(x, y).score(val_x, val_y)
    assert got.score == pytest.approx(max(scores.values()), abs=1e-6)
    assert scores[got.chosen] == pytest.approx(got.score, abs=1e-6)
    found = got.head()(torch.tensor(val_x, dtype=torch.float32)).argmax(1).numpy()
    assert 100 * (found == val_y).mean() == pytest.approx(got.score)


def test_fit_to_shares_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4)) * [1, 5, 0.2, 1], np.arange(50) % 3
    ridge = 0.02
    weight, bias = fit_shares(torch.tensor(x), F.one_hot(torch.tensor(y), 3).double(), ridge)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (50 * ridge), tol=1e-10, max_iter=10000)).fit(
        x, y
    )
    got = (torch.tensor(x) @ weight.T + bias).softmax(1).numpy()
    np.testing.assert_allclose(got, fitted.predict_proba(x), atol=1e-6)


def test_shares_of_classes_by_hand():
    mask = torch.tensor([[0, 1, 2, 255], [0, 0, 255, 255]], dtype=torch.uint8)
    assert class_shares(mask, (1, 2), 3).tolist() == [[0.75, 0.25, 0], [0, 0, 0.25]]


def mask_folder(root, n=6, size=(30, 36)):
    """A bright and a dark half, in colours that a backbone can tell apart."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (root / part / split).mkdir(parents=True)
        for i in range(n):
            mask = np.zeros(size, np.uint8)
            mask[:, int(rng.integers(10, 26)) :] = 1
            mask[:2] = 255
            pixels = np.where(mask[..., None] == 1, [230, 60, 30], [30, 60, 200]) + rng.normal(0, 10, (*size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("sea\nsand\n")
    return root


def segmentation(root):
    return Segmentation(
        open_folder_masks(root, "train"), open_folder_masks(root, "val"), Preprocess(SPEC, fit="resize"), 0
    )


def test_loss_of_pixels_is_the_mean_over_those_that_count(tmp_path):
    task = segmentation(mask_folder(tmp_path))
    logits, target = torch.randn(2, 2, 3, 3), torch.randint(0, 2, (2, 6, 6))
    target[0, :3] = 255
    whole = F.interpolate(logits, (6, 6), mode="bilinear", align_corners=False)
    terms = [
        -whole[b, :, i, j].log_softmax(0)[target[b, i, j]].item()
        for b in range(2) for i in range(6) for j in range(6) if target[b, i, j] != 255
    ]  # fmt: skip
    assert task.loss(logits, target).item() == pytest.approx(np.mean(terms), abs=1e-6)
    assert task.loss(logits, torch.full((2, 6, 6), 255)).item() == 0


def test_score_of_pixels_is_on_masks_of_full_size(tmp_path):
    task, model = segmentation(mask_folder(tmp_path)), backbone()
    probe = probe_pixels(model, task, 4, seed=0)
    found, true = [], []
    for i in range(len(task.val)):
        image = Preprocess(SPEC, fit="resize").of_file(task.val.image(i))[None]
        tokens = model.forward_features(image)["x_norm_patchtokens"]
        logits = (tokens @ probe.weight.T + probe.bias).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        found.append(F.interpolate(logits, (30, 36), mode="bilinear", align_corners=False)[0].argmax(0).flatten())
        true.append(task.val.mask(i).flatten())
    found, true = torch.cat(found).numpy(), torch.cat(true).numpy()
    ious = []
    for c in range(2):
        both = sum(1 for f, t in zip(found, true) if f == c and t == c)
        either = sum(1 for f, t in zip(found, true) if t != 255 and (f == c or t == c))
        ious.append(both / either)
    assert probe.score == pytest.approx(100 * np.mean(ious), abs=1e-6)
    assert probe.score > 60


def test_an_image_and_a_mask_of_other_sizes_are_refused(tmp_path):
    task = segmentation(mask_folder(tmp_path))
    Image.new("L", (5, 5)).save(tmp_path / "masks" / "train" / "0.png")
    with pytest.raises(DataError, match="must be alike"):
        task.sample(0, 0, FinetuneSettings())


# --- runs ------------------------------------------------------------------------------------------------------------


def start(root, out, head_scale=1.0, **settings):
    given = FinetuneSettings(**{"batch_size": 5, "epochs": 3, "checkpoint_steps": 2} | settings)
    model, task = backbone(), classification(root)
    prepare(model, given)
    torch.manual_seed(1)
    head = torch.nn.Linear(16, 3)
    head.weight.data *= head_scale
    return open_run(model, head, task, given, out, {"task": "classification"})


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    "settings", [{"mode": "lora", "lr": 5e-3}, {"mode": "full", "lr": 1e-3, "drop_path": 0.3}, {"mode": "last-k"}]
)
@pytest.mark.parametrize("kill_at", [3, 9])
def test_a_killed_run_goes_on_bit_for_bit(stripes, tmp_path, settings, kill_at):
    whole = train(start(stripes, tmp_path / "whole", **settings))

    def kill(step, total, loss):
        if step == kill_at:
            raise KilledError

    with pytest.raises(KilledError):
        train(start(stripes, tmp_path / "parts", **settings), on_step=kill)
    torch.rand(7)  # a new process would have another global generator
    resumed = start(stripes, tmp_path / "parts", **settings)
    assert 0 < resumed.step < kill_at  # something is lost and made again
    train(resumed)
    assert resumed.history == whole.history
    for run, name in ((whole, "whole"), (resumed, "parts")):
        write_result(run)
        assert json.loads((tmp_path / name / "finetune.json").read_text())["epochs"] == whole.history
    for file in ("weights/backbone.safetensors", "head.safetensors"):
        a, b = (load_file(tmp_path / folder / file) for folder in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())
    again = start(stripes, tmp_path / "parts", **settings)
    assert again.step == again.total_steps
    assert train(again).history == whole.history


def test_a_folder_takes_one_run_only(stripes, tmp_path):
    start(stripes, tmp_path, lr=1e-3)
    with pytest.raises(ConfigError, match="differs in lr, seed"):
        start(stripes, tmp_path, lr=1e-4, seed=1)
    (tmp_path / "state.pt").write_bytes(b"half a file")
    with pytest.raises(DataError, match="cannot be read"):
        start(stripes, tmp_path, lr=1e-3)


def test_a_loss_that_is_no_number_stops_the_run(stripes, tmp_path):
    with pytest.raises(DataError, match=r"loss is nan at step 1 of 15.*--lr"):
        train(start(stripes, tmp_path, head_scale=float("inf")))


def test_what_is_frozen_stays_and_what_trains_learns(stripes, tmp_path):
    frozen = train(start(stripes, tmp_path / "frozen", mode="frozen", lr=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(frozen.model.state_dict().values(), backbone().state_dict().values()))
    full = train(start(stripes, tmp_path / "full", mode="full", lr=3e-3, epochs=16, layer_decay=1.0))
    assert full.history[-1]["loss"] < 0.5 * full.history[0]["loss"]
    assert full.best["score"] == max(e["score"] for e in full.history) > 80
    scores = [e["score"] for e in full.history]
    assert full.best["epoch"] == scores.index(max(scores)) + 1
    write_result(full)
    tuned, task = opendino.load(tmp_path / "full"), classification(stripes)
    assert task.score(tuned, full.head, 4) == full.best["score"]  # the best epoch's weights, not the last's


# --- command ---------------------------------------------------------------------------------------------------------


def run(root, out, *words, capsys):
    folders = ["--train", str(root / "train"), "--val", str(root / "val")]
    args = ["--model", str(root / "model.safetensors"), "--cache", str(root / "cache"), "--out", str(out), "--json"]
    assert command.main([*(folders if "--masks" not in words else []), *args, "--batch", "6", *words]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_command_tunes_and_its_files_work_elsewhere(stripes, tmp_path, capsys):
    from opendino.cli.evaluate import main as evaluate

    out = tmp_path / "tuned"
    words = ["--mode", "lora", "--lora-mlp", "--epochs", "2", "--lr", "5e-3"]
    got, err = run(stripes, out, *words, capsys=capsys)
    assert err.index("Score to beat") < err.index("epoch   1/2")
    assert [e["epoch"] for e in got["epochs"]] == [1, 2]
    assert got["best"]["score"] == max(e["score"] for e in got["epochs"])
    assert got["gain"] == pytest.approx(got["best"]["score"] - got["probe"]["score"])
    assert got["trainable"] == 3 * 8 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    share = got["best"]["score"] / 100
    assert got["standard_error"] == pytest.approx(100 * (share * (1 - share) / 12) ** 0.5)
    assert json.loads((out / "finetune.json").read_text())["result"] == got
    again, err = run(stripes, out, *words, capsys=capsys)
    assert again == got
    assert "8 are done" in err

    assert opendino.load(out).state_dict().keys() == backbone().state_dict().keys()
    for model, head, score in ((out, "head", got["best"]["score"]),
                               (stripes / "model.safetensors", "probe", got["probe"]["score"])):  # fmt: skip
        args = ["--model", str(model), "--head", str(out / f"{head}.safetensors"), "--test", f"val={stripes / 'val'}"]
        assert evaluate(["robustness", *args, "--cache", "none", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sets"]["val"]["top1"] == pytest.approx(score)
        with pytest.raises(ConfigError, match="Give --size and --fit as they were"):
            evaluate(["robustness", *args, "--size", "42", "--cache", "none"])


def test_the_head_begins_as_the_probe(stripes, tmp_path, capsys):
    words = ["--mode", "frozen", "--epochs", "1", "--lr", "1e-9", "--warmup", "0"]
    got, _ = run(stripes, tmp_path / "a", *words, capsys=capsys)
    assert got["best"]["score"] == pytest.approx(got["probe"]["score"])
    assert not got["beats_probe"]
    got, _ = run(stripes, tmp_path / "b", *words, "--head-init", "zero", capsys=capsys)
    assert got["epochs"][0]["loss"] == pytest.approx(np.log(3), abs=1e-4)


def test_command_leaves_out_what_cannot_be_read_and_counts_it(stripes, tmp_path, capsys):
    class_folders(tmp_path / "train", 3)
    class_folders(tmp_path / "val", 2, seed=1)
    (tmp_path / "train" / "rows" / "broken.png").write_bytes(b"no image")
    (tmp_path / "model.safetensors").symlink_to(stripes / "model.safetensors")
    got, _ = run(tmp_path, tmp_path / "out", "--mode", "frozen", "--epochs", "1", capsys=capsys)
    assert (got["num_train"], got["num_val"], got["unreadable"]) == (9, 6, 1)


def test_a_head_of_pixels_has_the_published_layout_and_gives_the_same_logits(tmp_path):
    task, layer = segmentation(mask_folder(tmp_path)), torch.nn.Linear(16, 2)
    write_head(tmp_path / "h", backbone(), layer, task, "tiny", FinetuneSettings())
    tensors = load_file(tmp_path / "h")
    head = torch.nn.Module()
    head.bn, head.conv_seg = torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 2, 1)
    head.load_state_dict(tensors)
    tokens = torch.randn(1, 9, 16)
    got = head.eval().conv_seg(head.bn(tokens.permute(0, 2, 1).unflatten(2, (3, 3))))
    torch.testing.assert_close(got.flatten(2).permute(0, 2, 1), layer(tokens), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_command_on_masks(stripes, tmp_path, capsys, mode):
    mask_folder(tmp_path / "sea", n=4)
    got, _ = run(stripes, tmp_path / "out", "--masks", str(tmp_path / "sea"), "--mode", mode, "--epochs", "2",
                 capsys=capsys)  # fmt: skip
    assert (got["task"], got["metric"], got["num_train"]) == ("segmentation", "mIoU %", 4)
    assert got["best"]["score"] > got["probe"]["score"] - 15
    weight, bias, described = read_linear(tmp_path / "out" / "head.safetensors")
    assert (described["kind"], described["settings"]["classes"]) == ("Segmenter", ["sea", "sand"])
    task, layer = segmentation(tmp_path / "sea"), torch.nn.Linear(16, 2)
    layer.load_state_dict({"weight": weight, "bias": bias})
    assert task.score(opendino.load(tmp_path / "out"), layer, 3) == pytest.approx(got["best"]["score"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--masks", "nowhere", "--train", "train", "--val", "val"], "Give --train and --val"),
        (["--train", "train"], "Give --train and --val"),
        ([], "Give --train and --val"),
        (["--masks", "nowhere"], "is no folder"),
        (["--train", "train", "--val", "val", "--mode", "some"], "--mode"),
        (["--train", "train", "--val", "val", "--precision", "fp16"], "--precision"),
        (["--train", "train/rows", "--val", "val"], "without a class"),
    ],
)
def test_wrong_words_are_refused(stripes, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(stripes)
    with pytest.raises((ConfigError, DataError), match=message):
        command.main(["--model", "model.safetensors", "--out", str(tmp_path / "o"), *words])


def test_verdicts():
    result = {"metric": "top-1 %", "best": {"score": 70.0, "epoch": 2}, "probe": {"score": 70.0}, "beats_probe": False,
              "gain": 0.0, "standard_error": 3.0, "num_val": 200}  # fmt: skip
    assert "WARNING: fine-tuning did not beat the linear probe" in command.verdict(result)
    little = command.verdict(result | {"beats_probe": True, "gain": 2.0})
    assert "may be chance" in little
    assert "WARNING" not in little
    assert "chance" not in command.verdict(result | {"beats_probe": True, "gain": 9.0})
    assert "chance" not in command.verdict(result | {"beats_probe": True, "gain": 1.0, "standard_error": None})
