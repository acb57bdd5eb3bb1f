# SPDX-License-Identifier: Apache-2.0
"""The losses of a batch against one pass per crop and a double loop; what micro-batches may and may not change."""

import math

import pytest
import torch
import torch.nn.functional as F

from opendino.pretrain.config import parse_config
from opendino.pretrain.depth import DepthDraws
from opendino.pretrain.materialized import MaterializedStudentTeacher
from opendino.pretrain.student_teacher import Crops, StudentTeacher

B, L, TEMP = 3, 2, 0.05


def config(separate=False, centering="moving", koleo=0.1, arch="vits14", drop=0.0, batch_norm=False, ibot=1.0):
    return parse_config(
        f"""
        model:
          {{arch: {arch}, patch_size: 7, embed_dim: 12, depth: 2, num_heads: 2, init_values: 0.7,
           drop_path_rate: {drop}}}
        crops: {{global_size: 28, local_size: 14, num_local: {L}}}
        heads: {{num_prototypes: 10, hidden_dim: 8, bottleneck_dim: 5, separate: {str(separate).lower()},
                batch_norm: {str(batch_norm).lower()}}}
        loss: {{centering: {centering}, koleo_weight: {koleo}, ibot_weight: {ibot}}}
        """,
        "test",
    )  # fmt: skip


def model(kind=StudentTeacher, **settings):
    torch.manual_seed(0)
    built = kind(config(**settings))
    with torch.no_grad():  # wide weights, so that images differ
        for parameter in built.student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for a, b in zip(built.teacher.parameters(), built.student.parameters()):
            a.copy_(b + torch.randn_like(b) * 0.1)
    return built


def crops(local=True, images=B):
    torch.manual_seed(1)
    masks = torch.zeros(2 * images, 16, dtype=torch.bool)
    masks[0, [1, 5, 6]] = masks[3, [0, 2, 3, 7, 15]] = masks[2 * images - 1, 4] = True
    return Crops(
        torch.randn(2 * images, 3, 28, 28), torch.randn(L * images, 3, 14, 14) if local else None, masks
    )  # fmt: skip


def slow_loss(m, c, temp=TEMP, separate=False):
    """One image, one crop, one pair at a time, from method.md."""
    s = m.settings
    student, teacher = m.student, m.teacher
    ibot_head = "ibot_head" if separate else "dino_head"
    seen, told = [], []
    for i in range(2 * B):
        seen.append(student["backbone"].forward_features(c.global_crops[i : i + 1], c.masks[i : i + 1]))
        told.append(teacher["backbone"].forward_features(c.global_crops[i : i + 1]))
    targets = [torch.softmax(teacher["dino_head"](t["x_norm_clstoken"])[0] / temp, -1).detach() for t in told]

    def log_student(head, x):
        return F.log_softmax(student[head](x)[0] / s.student_temp, -1)

    num_local = 0 if c.local_crops is None else L
    dino = 0.0
    for image in range(B):
        for k in range(2):
            target = targets[k * B + image]
            other = seen[(1 - k) * B + image]["x_norm_clstoken"]
            dino = dino - (target * log_student("dino_head", other)).sum()
            for j in range(num_local):
                row = j * B + image
                x = student["backbone"].forward_features(c.local_crops[row : row + 1])["x_norm_clstoken"]
                dino = dino - (target * log_student("dino_head", x)).sum()
    dino = dino / B / (2 + 2 * num_local)
    ibot = 0.0
    for i in range(2 * B):
        where = c.masks[i].nonzero().flatten().tolist()
        for p in where:
            target = torch.softmax(teacher[ibot_head](told[i]["x_norm_patchtokens"][0, p : p + 1])[0] / temp, -1)
            x = seen[i]["x_norm_patchtokens"][0, p : p + 1]
            ibot = ibot - (target.detach() * log_student(ibot_head, x)).sum() / len(where)
    ibot = ibot / (2 * B)
    koleo = 0.0
    for k in range(2):
        x = F.normalize(torch.cat([f["x_norm_clstoken"] for f in seen[k * B : (k + 1) * B]]), dim=-1)
        for i in range(B):
            nearest = min(float((x[i] - x[j]).norm().detach()) for j in range(B) if j != i)
            j = next(j for j in range(B) if j != i and float((x[i] - x[j]).norm().detach()) == nearest)
            koleo = koleo - torch.log((x[i] - x[j]).norm()) / B
    return s.dino_weight * dino + s.ibot_weight * ibot + s.koleo_weight * koleo


def gradients(m):
    return {n: p.grad.clone() for n, p in m.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("separate", "local", "arch"), [(False, True, "vits14"), (True, True, "vits14_reg"), (False, False, "vits14")]
)
def test_the_loss_and_its_gradients_equal_the_slow_computation(separate, local, arch):
    m, c = model(separate=separate, arch=arch), crops(local)
    loss, parts = m.loss(c, m.targets([c], TEMP)[0])
    loss.backward()
    found = gradients(m)
    m.student.zero_grad()
    slow = slow_loss(m, c, separate=separate)
    slow.backward()
    assert float(loss) == pytest.approx(float(slow), abs=1e-5)
    assert float(parts["dino"]) == pytest.approx(float(parts["dino_global"] + parts["dino_local"]), abs=1e-6)
    for name, gradient in gradients(m).items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name


def test_the_teacher_starts_as_the_student_and_gets_no_gradient():
    m = StudentTeacher(config(drop=0.3))
    for a, b in zip(m.teacher.parameters(), m.student.parameters()):
        assert torch.equal(a, b)
        assert not a.requires_grad
    c = crops()
    m.loss(c, m.targets([c], TEMP)[0])[0].backward()
    assert all(p.grad is None for p in m.teacher.parameters())
    assert all(block.drop_path_rate == 0 for block in m.teacher["backbone"].blocks)
    assert all(block.drop_path_rate == 0.3 for block in m.student["backbone"].blocks)


@pytest.mark.parametrize("centering", ["sinkhorn", "moving"])
def test_targets_do_not_depend_on_the_cut_into_micro_batches(centering):
    m, c = model(centering=centering), crops(images=4)
    whole = m.targets([c], TEMP)[0]
    m.centers.load_state_dict(StudentTeacher(config()).centers.state_dict())
    parts = c.split(2)
    cut = m.targets(parts, TEMP)
    by_crop = whole.cls.unflatten(0, (2, 4))
    for i, target in enumerate(cut):
        assert torch.allclose(target.cls, by_crop[:, 2 * i : 2 * i + 2].flatten(0, 1), atol=1e-6)
    rows = [t for part, target in zip(parts, cut) for t in target.patches]
    assert len(rows) == len(whole.patches) == int(c.masks.sum())
    assert torch.allclose(torch.stack(rows).sum(0), whole.patches.sum(0), atol=1e-5)


def test_micro_batches_give_the_same_dino_and_ibot_gradients():
    """KoLeo looks for neighbours inside a micro-batch, and is left out here."""
    m, c = model(koleo=0.0), crops(images=4)
    m.loss(c, m.targets([c], TEMP)[0])[0].backward()
    whole = gradients(m)
    m.student.zero_grad()
    m.centers.load_state_dict(StudentTeacher(config()).centers.state_dict())
    parts = c.split(2)
    for part, target in zip(parts, m.targets(parts, TEMP)):
        (m.loss(part, target)[0] / 2).backward()
    for name, gradient in gradients(m).items():
        assert torch.allclose(whole[name], gradient, atol=1e-5), name


def test_one_image_and_no_mask_are_finite():
    m, c = model(), crops(images=3)
    single = Crops(c.global_crops[:2], c.local_crops[:L], torch.zeros(2, 16, dtype=torch.bool))
    loss, parts = m.loss(single, m.targets([single], TEMP)[0])
    loss.backward()
    assert math.isfinite(float(loss))
    assert float(parts["koleo"]) == 0
    assert all(torch.isfinite(g).all() for g in gradients(m).values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"separate": True, "centering": "sinkhorn", "batch_norm": True},
        {"drop": 0.4, "centering": "sinkhorn", "ibot": 0.5},
        {"ibot": 0.0, "separate": True},
    ],
)
@pytest.mark.parametrize("local", [False, True])
def test_chunks_equal_whole_logits_in_losses_gradients_and_state(settings, local):
    results = []
    for kind in (StudentTeacher, MaterializedStudentTeacher):
        m, c = model(kind, **settings), crops(local)
        [targets] = m.targets([c], TEMP)
        loss, parts = m(c, targets, DepthDraws(0, 3, 0, B, B))
        loss.backward()
        results.append((loss.detach(), parts, targets.cls, targets.patches, gradients(m), dict(m.named_buffers())))
    found, wanted = results
    assert set(found[1]) == set(wanted[1])
    for name in wanted[1]:
        assert float(found[1][name]) == pytest.approx(float(wanted[1][name]), rel=1e-6, abs=1e-6), name
    for a, b in zip((found[0], *found[2:4]), (wanted[0], *wanted[2:4])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for i in (4, 5):
        assert set(found[i]) == set(wanted[i])
        for name in wanted[i]:
            torch.testing.assert_close(found[i][name], wanted[i][name], rtol=1e-5, atol=1e-5, msg=name)


def test_each_head_is_called_once_however_many_patches_are_masked():
    for separate in (False, True):
        m, c = model(separate=separate), crops()
        calls: list[str] = []
        for name, module in (*m.student.items(), *m.teacher.items()):
            if "head" in name:
                module.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
        expected = sorted(["dino_head", "ibot_head"][: 1 + separate] * 2)
        for masks in (c.masks, torch.zeros_like(c.masks)):
            calls.clear()
            part = Crops(c.global_crops, c.local_crops, masks)
            m.student.zero_grad()
            m.loss(part, m.targets([part], TEMP)[0])[0].backward()
            assert sorted(calls) == expected
            assert all(p.grad is not None for n, p in m.student.named_parameters() if "head" in n)


def test_bf16_stays_close_to_fp32():
    losses = []
    for enabled in (False, True):
        m, c = model(centering="sinkhorn"), crops()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, parts = m.loss(c, m.targets([c], TEMP)[0])
        loss.backward()
        losses.append((float(parts["dino"]), float(parts["ibot"]), gradients(m)))
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=0.03)
    for name in ("dino_head.last_layer.weight", "backbone.blocks.0.mlp.fc1.weight"):
        exact = losses[0][2][name]
        assert torch.nn.functional.cosine_similarity(losses[1][2][name].flatten(), exact.flatten(), dim=0) > 0.97, name
