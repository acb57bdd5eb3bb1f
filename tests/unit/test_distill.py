# SPDX-License-Identifier: Apache-2.0
"""Distillation: both losses against literal loops, the frozen teacher, the cache, and users' mistakes."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import opendino
from opendino.cli import distill as cli
from opendino.errors import ConfigError, WeightsError
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.native import build
from opendino.pretrain.config import parse_config
from opendino.pretrain.distill.config import DistillConfig, WarmHeadsConfig
from opendino.pretrain.distill.defaults import distill_defaults
from opendino.pretrain.distill.features import ChannelStatistics, FeatureDistillation, aligned
from opendino.pretrain.distill.matching import check_pair, choose_mode
from opendino.pretrain.distill.paper import PaperDistillation
from opendino.pretrain.distill.teacher import FrozenTeacher
from opendino.pretrain.distill.views import FixedViews
from opendino.pretrain.distill.warm_heads import is_trained, warm_heads_config
from opendino.pretrain.engines import make_engine
from opendino.pretrain.heads import DINOHead
from opendino.pretrain.student_teacher import Crops
from opendino.pretrain.trainer import Trainer

K = 12


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def make_teacher(folder, *, heads=True, separate=True, batch_norm=False, patch=7, dim=24, seed=0, num_heads=2):
    """Write a small teacher as a run leaves one, without its settings; give the path of its weights."""
    torch.manual_seed(seed)
    config = ViTConfig(img_size=28, patch_size=patch, embed_dim=dim, depth=2, num_heads=num_heads, init_values=1.0)
    folder.mkdir(exist_ok=True)
    (folder / "weights").mkdir(exist_ok=True)
    save_backbone(VisionTransformer(config), folder / "weights" / "teacher.safetensors")
    if heads:
        names = ("dino_head", "ibot_head") if separate else ("dino_head",)
        made = {
            n: DINOHead(dim, K, hidden_dim=20, bottleneck_dim=6, batch_norm=batch_norm, init_std=0.3) for n in names
        }
        for head in made.values():
            torch.nn.init.normal_(head.last_layer.weight)
        state = {f"{n}.{k}": v for n, head in made.items() for k, v in head.state_dict().items()}
        save_file(state, folder / "heads.safetensors")
    return folder


def settings(teacher, extra="", **values):
    text = f"""
    teacher: {teacher}
    student: vitt14
    steps: 6
    batch_size: 4
    num_workers: 0
    device: cpu
    precision: fp32
    log_every: 1
    checkpoint_every: 100
    model: {{arch: vitt14, patch_size: 7, embed_dim: 12, depth: 1, num_heads: 2, init_values: 1.0}}
    crops: {{global_size: 28, local_size: 14, num_local: 2}}
    heads: {{num_prototypes: {K}, hidden_dim: 8, bottleneck_dim: 4, separate: true}}
    optim: {{lr: 1.0e-2, lr_rule: none, warmup_steps: 2, freeze_last_layer_steps: 1}}
    """
    merged = parse_config(text, "test").model_dump()
    for key, value in (
        json.loads(json.dumps(values)) | (parse_config(extra, "extra").model_dump(exclude_unset=True) if extra else {})
    ).items():
        merged[key] = merged[key] | value if isinstance(value, dict) else value
    return DistillConfig.model_validate(merged)


def crops_of(images=3, local=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(n, size):
        return torch.randn(n, 3, size, size, generator=g, dtype=torch.float64)

    masks = torch.zeros(2 * images, 16, dtype=torch.bool)
    return Crops(draw(2 * images, 28), draw(local * images, 14), masks, torch.ones_like(masks))


def in_double(model):
    frozen = model.frozen
    frozen.backbone.double()
    if frozen.heads is not None:
        frozen.heads.double()
    return model.double()


# --- the paper's loss ------------------------------------------------------------------------------------------------


def token_by_token(backbone, crop):
    """cls (D,) and patches (P, D) of one crop by itself."""
    found = backbone(crop.unsqueeze(0), is_training=True)
    return found["x_norm_clstoken"][0], found["x_norm_patchtokens"][0]


def logits_of(head, token):
    """Logits of one token, from the weights of a head without BatchNorm as they are written."""
    layers = [m for m in head.mlp if isinstance(m, torch.nn.Linear)]
    x = token
    for i, layer in enumerate(layers):
        x = layer.weight @ x + layer.bias
        if i + 1 < len(layers):
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    x = x / x.norm()
    return torch.stack([(w / w.norm()) @ x for w in head.last_layer.weight])


def literal_sinkhorn(rows, temp):
    q = [[math.exp(float(v) / temp) for v in row] for row in rows]
    n = len(q)
    for _ in range(3):
        columns = [sum(q[i][k] for i in range(n)) for k in range(K)]
        q = [[q[i][k] / (columns[k] * K) for k in range(K)] for i in range(n)]
        q = [[v / (sum(row) * n) for v in row] for row in q]
    return [[v * n for v in row] for row in q]


def literal_paper_loss(model, crops, temp):
    """DINO + iBOT + 0.1 KoLeo by loops over images, crops, patches and prototypes."""
    frozen, student = model.frozen, model.student
    b = crops.num_images
    with torch.no_grad():
        seen = [token_by_token(frozen.backbone, x) for x in crops.global_crops]
        cls_targets = literal_sinkhorn([logits_of(frozen.heads["dino_head"], c) for c, _ in seen], temp)
        patch_rows = [logits_of(frozen.heads["ibot_head"], p) for _, patches in seen for p in patches]
        patch_targets = literal_sinkhorn(patch_rows, temp)

    def cross_entropy(target, logits):
        scaled = logits / 0.1
        log_sum = torch.log(torch.exp(scaled).sum())
        return sum(-t * (s - log_sum) for t, s in zip(target, scaled))

    own = [token_by_token(student["backbone"], x) for x in crops.global_crops]
    local = [token_by_token(student["backbone"], x)[0] for x in crops.local_crops]
    dino_terms, ibot_terms = [], []
    for i in range(b):
        for g in range(2):
            logits = logits_of(student["dino_head"], own[g * b + i][0])
            dino_terms.append(cross_entropy(cls_targets[(1 - g) * b + i], logits))
            for j in range(len(local) // b):
                logits = logits_of(student["dino_head"], local[j * b + i])
                dino_terms.append(cross_entropy(cls_targets[g * b + i], logits))
    for c, (_, patches) in enumerate(own):
        for p, token in enumerate(patches):
            target = patch_targets[c * len(patches) + p]
            ibot_terms.append(cross_entropy(target, logits_of(student["ibot_head"], token)))
    dino, ibot = sum(dino_terms) / len(dino_terms), sum(ibot_terms) / len(ibot_terms)
    koleo = 0
    for g in range(2):
        unit = [own[g * b + i][0] / own[g * b + i][0].norm() for i in range(b)]
        for i in range(b):
            nearest = min((float((unit[i] - unit[j]).detach().norm()), j) for j in range(b) if j != i)[1]
            koleo = koleo - torch.log((unit[i] - unit[nearest]).norm()) / b
    return dino + ibot + 0.1 * koleo, {"dino": dino, "ibot": ibot, "koleo": koleo}


def test_a_step_as_in_the_paper_equals_a_literal_one(tmp_path):
    config = settings(make_teacher(tmp_path / "teacher"))
    model = in_double(PaperDistillation(config, FrozenTeacher(config.teacher)))
    with torch.no_grad():
        for head in ("dino_head", "ibot_head"):
            torch.nn.init.normal_(model.student[head].last_layer.weight)
    crops = crops_of()
    [targets] = model.targets([crops], 0.07)
    total, parts = model.loss(crops, targets)
    total.backward()
    got = {n: p.grad.clone() for n, p in model.student.named_parameters() if p.grad is not None}
    model.zero_grad()
    want, want_parts = literal_paper_loss(model, crops, 0.07)
    want.backward()
    assert total.item() == pytest.approx(want.item(), abs=1e-5)
    for name, value in want_parts.items():
        assert parts[name].item() == pytest.approx(value.item(), abs=1e-5), name
    for name, parameter in model.student.named_parameters():
        if name.endswith("mask_token"):  # no mask, no gradient
            assert got.get(name, torch.zeros(1)).abs().max() == 0
            continue
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-4)
    assert targets.features.double() == pytest.approx(
        torch.stack([token_by_token(model.student["backbone"], x)[0] for x in crops.global_crops]).detach(), abs=1e-5
    )


def test_targets_do_not_depend_on_how_a_batch_is_cut(tmp_path):
    config = settings(make_teacher(tmp_path / "teacher"))
    model = in_double(PaperDistillation(config, FrozenTeacher(config.teacher)))
    crops = crops_of(images=4)
    [whole] = model.targets([crops], 0.07)
    halves = model.targets(crops.split(2), 0.07)
    for g in range(2):
        for i, half in enumerate(halves):
            torch.testing.assert_close(whole.cls[4 * g + 2 * i : 4 * g + 2 * i + 2], half.cls[2 * g : 2 * g + 2])


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "standardize"), [(7, True), (7, False), (14, True)])
def test_the_loss_of_features_equals_a_literal_one(patch, standardize, tmp_path):
    config = settings(
        make_teacher(tmp_path / "teacher", heads=False, patch=patch),
        mode="features",
        features={"standardize": standardize},
        loss={"koleo_weight": 0.0},
    )
    frozen = FrozenTeacher(config.teacher)
    model = in_double(FeatureDistillation(config, frozen))
    crops = crops_of()
    [targets] = model.targets([crops], 0.07)
    total, parts = model.loss(crops, targets)
    total.backward()
    got = {n: p.grad.clone() for n, p in model.student.named_parameters() if p.grad is not None}
    model.zero_grad()

    every = [x for group in (crops.global_crops, crops.local_crops) for x in group]
    with torch.no_grad():
        seen = [token_by_token(frozen.backbone, x) for x in every]
    if standardize:
        seen = list(zip(scaled([c[None] for c, _ in seen]), scaled([p for _, p in seen])))
        seen = [(c[0], p) for c, p in seen]
    cls_terms, patch_terms, adapters = [], [[], []], (model.student["cls_adapter"], model.student["patch_adapter"])
    for x, (cls, patches) in zip(every, seen):
        own_cls, own_patches = token_by_token(model.student["backbone"], x)
        mapped = adapters[0].weight @ own_cls + adapters[0].bias
        cls_terms.append(1 - mapped @ cls / (mapped.norm() * cls.norm()))
        rows = torch.stack([adapters[1].weight @ p + adapters[1].bias for p in own_patches])
        if patch == 14:  # the teacher's grid is half as fine: average the student's patches two by two
            side = math.isqrt(len(rows))
            cells = rows.unflatten(0, (side // 2, 2, side // 2, 2))
            rows = torch.stack([cells[i, :, j].mean((0, 1)) for i in range(side // 2) for j in range(side // 2)])
        of_crop = []
        for row, target in zip(rows, patches, strict=True):
            cosine = row @ target / (row.norm() * target.norm())
            gap = (row - target).abs()
            l1 = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
            of_crop.append(0.9 * (1 - cosine) + 0.1 * l1)
        patch_terms[0].append(sum(of_crop) / len(of_crop))
    want_cls, want_patch = sum(cls_terms) / len(every), sum(patch_terms[0]) / len(every)
    (want_cls + want_patch).backward()
    tolerance = 1e-5
    assert parts["feature_cls"].item() == pytest.approx(want_cls.item(), abs=tolerance)
    assert parts["feature_patch"].item() == pytest.approx(want_patch.item(), abs=tolerance)
    assert total.item() == pytest.approx((want_cls + want_patch).item(), abs=tolerance)
    for name, parameter in model.student.named_parameters():
        if not name.endswith("mask_token"):
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4)


def scaled(groups):
    """Bring channels to mean 0, variance 1 over all rows."""
    rows = torch.cat(groups)
    return [(g - rows.mean(0)) / torch.sqrt(rows.var(0, unbiased=False) + 1e-6) for g in groups]


def test_statistics_run_over_everything_seen():
    rows = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    statistics = ChannelStatistics(5)
    for part in rows.split(13):
        statistics.update([part])
    want = (rows - rows.mean(0)) / torch.sqrt(rows.var(0, unbiased=False) + 1e-6)
    torch.testing.assert_close(statistics(rows), want, atol=1e-5, rtol=1e-5)


def test_grids_meet_at_the_coarser_one():
    fine, coarse = torch.arange(9.0).view(1, 9, 1), torch.arange(4.0).view(1, 4, 1)
    a, b = aligned(fine, (3, 3), coarse, (2, 2))
    assert b.flatten().tolist() == [0, 1, 2, 3]
    # windows of adaptive averages of 3 into 2: rows 0-1 and 1-2, overlapping
    assert a.flatten().tolist() == [2.0, 3.0, 5.0, 6.0]
    same = aligned(fine, (3, 3), fine, (3, 3))
    assert same[0] is fine
    a, b = aligned(coarse, (2, 2), fine, (3, 3))
    assert (a.flatten().tolist(), b.flatten().tolist()) == ([0, 1, 2, 3], [2.0, 3.0, 5.0, 6.0])


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def native_kernels(monkeypatch):
    """Turns the native kernels on ("1") or off ("0") for one test."""

    def turn(value):
        monkeypatch.setenv("OPENDINO_NATIVE", value)
        build._kernels.cache_clear()

    yield turn
    build._kernels.cache_clear()


def train(config):
    run = Trainer(config)
    run.train()
    return run


def losses(run):
    return [json.loads(line)["loss"] for line in (run.run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run.run / "weights" / "teacher.safetensors") | load_file(run.run / "heads.safetensors")


def same(a, b):
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("mode", ["paper", "features"])
@pytest.mark.parametrize(("dtype", "native"), [("fp32", "0"), ("fp16", "1")])
def test_a_cached_teacher_trains_as_a_live_one_bit_for_bit(mode, dtype, native, images, tmp_path, native_kernels):
    native_kernels(native)  # torch's colours depend on the rest of a batch in their last bit
    teacher = make_teacher(tmp_path / "teacher", batch_norm=True)
    common = {"data": str(images), "mode": mode, "views": 2, "steps": 10, "cache_dtype": dtype}
    live = train(settings(teacher, out=str(tmp_path / "live"), **common))
    cache = str(tmp_path / "cache")
    filling = train(settings(teacher, out=str(tmp_path / "filling"), cache_teacher=cache, **common))
    assert len(filling.engine.cache) == 16
    reading = Trainer(settings(teacher, out=str(tmp_path / "reading"), cache_teacher=cache, **common))

    def refuse(*args):
        raise AssertionError("the teacher looked at an image")

    reading.engine.frozen.tokens = refuse
    reading.train()
    assert losses(live) == losses(filling) == losses(reading)
    assert same(live, filling)
    assert same(live, reading)
    fresh = train(settings(teacher, out=str(tmp_path / "fresh"), **(common | {"views": 0})))
    assert losses(fresh) != losses(live)


def test_a_damaged_record_is_made_again(images, tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    common = {"data": str(images), "views": 1, "steps": 4, "cache_teacher": str(tmp_path / "cache")}
    first = train(settings(teacher, out=str(tmp_path / "first"), **common))
    path = tmp_path / "cache" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert same(first, train(settings(teacher, out=str(tmp_path / "second"), **common)))


def test_a_cache_of_something_else_is_refused(images, tmp_path):
    common = {"data": str(images), "views": 1, "steps": 2, "cache_teacher": str(tmp_path / "cache")}
    train(settings(make_teacher(tmp_path / "teacher"), out=str(tmp_path / "a"), **common))
    other = make_teacher(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"other inputs \(teacher differ\)"):
        Trainer(settings(other, out=str(tmp_path / "b"), **common))


def test_fixed_views_follow_from_image_and_view_alone():
    views = FixedViews(2, num_images=10, batch_size=4)  # two steps an epoch
    assert [views.of_step(s) for s in range(7)] == [0, 0, 1, 1, 0, 0, 1]
    first = views(3, counter=0).random(4)
    assert np.array_equal(first, views(3, counter=4 * 4 + 3).random(4))  # step 4 shows view 0 again
    assert not np.array_equal(first, views(3, counter=2 * 4).random(4))
    assert not np.array_equal(first, views(4, counter=0).random(4))
    assert np.array_equal(first, FixedViews(2, 10, 5)(3, counter=0).random(4))


@pytest.mark.parametrize("mode", ["paper", "features"])
@pytest.mark.parametrize("separate", [True, False])
def test_the_teacher_stays_as_it_was_and_the_result_is_the_students_average(mode, separate, images, tmp_path):
    teacher = make_teacher(tmp_path / "teacher", batch_norm=True, separate=separate)
    config = settings(
        teacher,
        data=str(images),
        out=str(tmp_path / "run"),
        mode=mode,
        heads={"batch_norm": True, "separate": separate},
    )
    run = Trainer(config)
    before = {k: v.clone() for k, v in run.engine.frozen.state().items()}
    student = {k: v.clone() for k, v in run.model.student.state_dict().items()}
    run.train()
    after = run.engine.frozen.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not torch.equal(
        student["backbone.blocks.0.mlp.fc1.weight"], run.model.student["backbone"].blocks[0].mlp.fc1.weight
    )
    loaded = opendino.load(tmp_path / "run")
    assert loaded.embed_dim == 12
    for key, value in run.teacher.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    for a, b in zip(run.model.teacher.buffers(), run.model.student.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_step_moves_the_average_by_its_momentum(images, tmp_path):
    config = settings(make_teacher(tmp_path / "t"), data=str(images), out=str(tmp_path / "run"), steps=1)
    run = Trainer(
        config.model_copy(update={"optim": config.optim.model_copy(update={"warmup_steps": 0, "momentum": 0.75})})
    )
    old = run.model.teacher["backbone"].pos_embed.clone()
    run.train()
    want = 0.75 * old + 0.25 * run.model.student["backbone"].pos_embed
    torch.testing.assert_close(run.model.teacher["backbone"].pos_embed.detach(), want.detach())


@pytest.mark.parametrize("mode", ["paper", "features"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(mode, images, tmp_path):
    teacher = make_teacher(tmp_path / "teacher", batch_norm=True)
    common = {"data": str(images), "mode": mode, "checkpoint_every": 2}
    whole = train(settings(teacher, out=str(tmp_path / "whole"), **common))
    cut = Trainer(settings(teacher, out=str(tmp_path / "cut"), **common))
    batches = cut.batches()
    for _ in range(2):
        record = cut.advance(batches)
        record.pop("signal")
        cut._finish_step(record)
    cut.checkpointer.finish(required=True)
    again = Trainer(parse_config((tmp_path / "cut" / "config.yaml").read_text(), "test"))
    assert isinstance(again.config, DistillConfig)
    assert again.step == 2
    again.train()
    assert losses(whole) == losses(again)
    assert same(whole, again)


def test_the_mode_that_was_chosen_is_written_down(images, tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    run = Trainer(settings(teacher, data=str(images), out=str(tmp_path / "run"), steps=2))
    assert "(--mode paper)" in run.engine.about
    assert parse_config((run.run / "config.yaml").read_text(), "test").mode == "paper"
    again = Trainer(settings(teacher, data=str(images), out=str(tmp_path / "run"), steps=2))
    assert again.step == 0
    (teacher / "heads.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no DINO and iBOT heads"):
        Trainer(parse_config((run.run / "config.yaml").read_text(), "test"))


def test_a_run_is_not_continued_with_another_teacher(images, tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    train(settings(teacher, data=str(images), out=str(tmp_path / "run"), steps=4, checkpoint_every=2))
    moved = teacher.rename(tmp_path / "moved")  # another place is no other teacher
    run = Trainer(settings(moved, data=str(images), out=str(tmp_path / "run"), steps=4))
    assert run.step == 4
    (tmp_path / "run" / "checkpoints" / "step_00000004").rename(tmp_path / "gone")
    make_teacher(moved, seed=5)
    with pytest.raises(ConfigError, match="other weights than when this run was begun"):
        train(settings(moved, data=str(images), out=str(tmp_path / "run"), steps=4))


def test_micro_batches_give_the_same_first_loss(images, tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    for mode in ("paper", "features"):
        common = {"data": str(images), "mode": mode, "steps": 1, "loss": {"koleo_weight": 0.0}}
        one = train(settings(teacher, out=str(tmp_path / f"one-{mode}"), **common))
        two = train(settings(teacher, out=str(tmp_path / f"two-{mode}"), accumulate=2, **common))
        assert losses(one)[0] == pytest.approx(losses(two)[0], abs=1e-5)


def test_heads_are_trained_for_a_frozen_backbone(images, tmp_path):
    teacher = make_teacher(tmp_path / "teacher", heads=False)
    config = settings(teacher, data=str(images), out=str(tmp_path / "run"), warm_heads=3)
    with pytest.raises(ConfigError, match="patches of 7 px and the student has 14 px"):
        warm_heads_config(settings(teacher, out=str(tmp_path / "run"), warm_heads=3, model={"patch_size": 14}))
    warm = warm_heads_config(config)
    assert (warm.steps, warm.masks.share, is_trained(warm)) == (3, 0.5, False)
    run = Trainer(warm)
    before = {k: v.clone() for k, v in run.model.student.state_dict().items()}
    run.train()
    assert is_trained(warm)
    after = run.model.student.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert all(k.split(".")[0] in ("dino_head", "ibot_head") for k in moved)
    original = load_file(teacher / "weights" / "teacher.safetensors")
    for network in (run.model.student, run.model.teacher):
        assert all(torch.equal(network["backbone"].state_dict()[k], v) for k, v in original.items())
    read = parse_config((tmp_path / "run" / "warm_heads" / "config.yaml").read_text(), "test")
    assert isinstance(read, WarmHeadsConfig)
    student = train(config)
    assert isinstance(student.model, PaperDistillation)
    assert "ibot" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


def test_a_timm_student_trains_loads_and_embeds(images, tmp_path):
    timm = pytest.importorskip("timm")
    for name in [n for n in ("test_resnet", "test_vit", "test_convnext") if n in timm.list_models()]:
        config = settings(
            make_teacher(tmp_path / "teacher"), data=str(images), out=str(tmp_path / name),
            student=f"timm:{name}", steps=2, crops={"global_size": 70, "local_size": 35},
        )  # fmt: skip
        run = train(config)
        assert isinstance(run.model, FeatureDistillation)  # auto: its grid is another
        found = opendino.load(tmp_path / name)
        assert found.config.arch == f"timm:{name}"
        found.eval()
        want = run.teacher.eval()
        x = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(found(x), want(x))
        vectors = opendino.Embedder(found, batch_size=4)(sorted(map(str, images.glob("*.jpg"))))
        assert vectors.cls.shape == (8, found.embed_dim)
        assert vectors.patches.shape[1] == vectors.grid[0] * vectors.grid[1]
        assert np.isfinite(vectors.cls).all()


def test_an_unknown_timm_name_names_others(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match="no model of timm.*resnet"):
        make_engine(settings(make_teacher(tmp_path / "teacher"), student="timm:resnet17"))


def test_without_timm_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(opendino.errors.MissingExtraError, match=r"opendino\[timm\]"):
        make_engine(settings(make_teacher(tmp_path / "teacher"), student="timm:resnet18"))


# --- what goes together ----------------------------------------------------------------------------------------------


def test_the_mode_follows_from_the_teacher(tmp_path):
    with_heads = FrozenTeacher(str(make_teacher(tmp_path / "a")))
    without = FrozenTeacher(str(make_teacher(tmp_path / "b", heads=False)))
    assert choose_mode(settings("a"), with_heads) == "paper"
    assert choose_mode(settings("a", mode="features"), with_heads) == "features"
    assert choose_mode(settings("b"), without) == "features"
    assert choose_mode(settings("a", model={"patch_size": 14}), with_heads) == "features"
    with pytest.raises(ConfigError, match="has no DINO and iBOT heads.*--warm-heads 5000.*--mode features"):
        choose_mode(settings("b", mode="paper"), without)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "paper", "model": {"patch_size": 14}}, "patches of 7 px and the student has 14.*patch by patch"),
        ({"mode": "paper", "heads": {"num_prototypes": 5}}, "have 12 prototypes and the student's have 5"),
        ({"crops": {"local_size": 12}, "mode": "features", "model": {"patch_size": 4}}, "Crops of 12 px are no whole"),
        ({"model": {"in_chans": 1}, "crops": {"mean": [0.5], "std": [0.2]}}, "3 channels and the student for 1"),
    ],
)
def test_pairs_that_cannot_be_trained_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make_engine(settings(make_teacher(tmp_path / "teacher"), **changes))


def test_a_student_larger_than_its_teacher_is_remarked_on(tmp_path, caplog):
    config = settings(make_teacher(tmp_path / "teacher", dim=8), model={"embed_dim": 24, "depth": 3})
    frozen = FrozenTeacher(config.teacher)
    model = PaperDistillation(config, frozen)
    check_pair(config, frozen, model.student["backbone"], "paper")
    assert "larger than its teacher" in caplog.text


def test_heads_that_do_not_fit_are_refused(tmp_path):
    wide = make_teacher(tmp_path / "wide", dim=32)
    narrow = make_teacher(tmp_path / "narrow")
    with pytest.raises(WeightsError, match="backbone of width 32, and the teacher's is 24"):
        FrozenTeacher(str(narrow), wide)
    with pytest.raises(WeightsError, match="holds no DINO head"):
        FrozenTeacher(str(narrow), narrow / "weights" / "teacher.safetensors")
    assert FrozenTeacher(str(narrow), narrow / "heads.safetensors").heads is not None


def test_heads_in_the_original_names_are_read(tmp_path):
    """A checkpoint of the original has backbone and heads in one file, prototypes weight-normalised."""
    folder = make_teacher(tmp_path / "teacher", dim=64, num_heads=1)
    backbone, heads = (load_file(folder / n) for n in ("weights/teacher.safetensors", "heads.safetensors"))
    state = {f"backbone.{k}": v for k, v in backbone.items()}
    for key, value in heads.items():
        if key.endswith("last_layer.weight"):
            state[f"{key}_g"], state[f"{key}_v"] = torch.ones(K, 1), value
        else:
            state[key] = value
    torch.save({"teacher": state}, tmp_path / "teacher_checkpoint.pth")
    ours, theirs = FrozenTeacher(str(folder)), FrozenTeacher(str(tmp_path / "teacher_checkpoint.pth"))
    assert ours.fingerprint == theirs.fingerprint
    assert ours.heads is not None


def test_settings_say_what_does_not_go_together():
    with pytest.raises(ConfigError, match="cache_teacher needs fixed augmentations"):
        parse_config("{teacher: x, cache_teacher: folder}", "test")
    with pytest.raises(ConfigError, match="warm_heads trains heads for the teacher, and mode features uses none"):
        parse_config("{teacher: x, warm_heads: 5, mode: features}", "test")
    with pytest.raises(ConfigError, match="unknown setting 'vieuws', did you mean 'views'"):
        parse_config("{teacher: x, vieuws: 5}", "test")


def test_defaults_follow_from_teacher_and_student(tmp_path, images):
    run = parse_config(
        f"""{{recipe: vitt14_demo, data: {images}, out: {tmp_path / "run"}, steps: 1, batch_size: 4, num_workers: 0,
        device: cpu, precision: fp32, model: {{arch: vits14, patch_size: 7, embed_dim: 16, depth: 2, num_heads: 2}},
        crops: {{global_size: 28, local_size: 14, num_local: 2, mean: [0.4, 0.4, 0.4]}},
        heads: {{num_prototypes: {K}, hidden_dim: 8, bottleneck_dim: 4}},
        loss: {{teacher_temp: 0.05, warmup_teacher_temp: 0.04}}, masks: {{share: 0.5}}}}""",
        "test",
    )
    train(run)
    found = distill_defaults(str(tmp_path / "run"), "vitt14")
    assert (found.model.arch, found.model.patch_size, found.model.embed_dim, found.model.depth) == (
        "vitt14",
        7,
        None,
        None,
    )
    assert (found.heads.num_prototypes, found.masks.share, found.model.drop_path_rate) == (K, 0.0, 0.0)
    assert (found.loss.teacher_temp, found.loss.warmup_teacher_temp, found.loss.koleo_weight) == (0.05, 0.05, 0.1)
    assert (found.crops.mean, found.data, found.out) == ((0.4, 0.4, 0.4), "", "")
    assert distill_defaults(str(tmp_path / "run"), "vitt14", mode="features").loss.koleo_weight == 0
    by_recipe = distill_defaults(str(tmp_path / "run"), "vitb14", recipe="vitb14")
    assert (by_recipe.heads.num_prototypes, by_recipe.optim.lr) == (K, 4e-3)
    weights_only = distill_defaults(str(tmp_path / "run" / "weights" / "teacher.safetensors"), "vitb14")
    assert (weights_only.recipe, weights_only.loss.koleo_weight) == ("vitb14", 0.0)
    with pytest.raises(ConfigError, match="is no student"):
        distill_defaults(str(tmp_path / "run"), "resnet18")


def test_a_distillation_in_stages_is_refused():
    with pytest.raises(ConfigError, match="has no stages"):
        parse_config("{teacher: vits14, stages: [{name: a, steps: 5}]}", "settings")


def test_a_student_starts_from_weights(images, tmp_path):
    start = make_teacher(tmp_path / "start", heads=False, dim=12, seed=5)
    config = settings(
        make_teacher(tmp_path / "teacher"),
        model={"depth": 2},
        init={"weights": str(start)},
        data=str(images),
        out=str(tmp_path / "run"),
    )
    trainer = Trainer(config)
    given = load_file(start / "weights" / "teacher.safetensors")
    for network in (trainer.model.student, trainer.model.teacher):
        state = network["backbone"].state_dict()
        assert all(torch.equal(state[k], v) for k, v in given.items())
    assert all(v.isfinite().all() for v in weights(train(config)).values())


def test_init_is_short_for_its_weights(monkeypatch):
    monkeypatch.setattr(cli, "distill_defaults", lambda *args, **kwargs: DistillConfig(teacher="a"))
    argv = ["--teacher", "a", "--student", "vits14", "--data", "b", "--out", "c", "--init", "start.safetensors"]
    assert cli.read_arguments(argv)[0].init.weights == "start.safetensors"
