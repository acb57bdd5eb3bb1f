# SPDX-License-Identifier: Apache-2.0
"""Health figures on cases whose values are known by hand."""

import math

import pytest
import torch
from torch import nn

from opendino.pretrain.health import (
    UpdateNorm,
    entropy,
    first_crops,
    health,
    neighbour_figures,
    norm_figures,
    prototype_use,
    prototypes_won,
    rank_me,
    token_norms,
)


def test_entropy_of_uniform_and_certain_targets():
    assert entropy(torch.full((5, 8), 1 / 8)) == pytest.approx(math.log(8), rel=1e-6)
    assert entropy(torch.eye(4)) == 0


def test_prototype_use_counts_winners():
    assert prototype_use(torch.eye(4)) == 1
    rows = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1]])
    assert prototype_use(rows) == 0.5
    assert prototypes_won(rows) == 1


def test_feature_rank_counts_directions():
    assert rank_me(torch.eye(6)) == pytest.approx(6, rel=1e-4)
    assert rank_me(torch.ones(10, 1) @ torch.randn(1, 6)) == pytest.approx(1, abs=0.01)


def test_neighbours_of_orthogonal_rows_and_of_duplicates():
    figures = neighbour_figures(3 * torch.eye(4))
    assert figures["koleo_distance"] == pytest.approx(math.sqrt(2), rel=1e-6)
    assert figures["near_duplicates"] == 0
    rows = torch.cat([torch.eye(4), torch.eye(4)[:1] + 1e-3])
    figures = neighbour_figures(rows)
    assert figures["near_duplicates"] == pytest.approx(2 / 5)
    assert figures["koleo_distance"] < math.sqrt(2) * 0.7
    assert neighbour_figures(torch.ones(1, 4)) == {}


def test_neighbour_distance_equals_a_loop():
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    unit = [row / row.norm() for row in x]
    distances = [min(float((a - b).norm()) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    assert neighbour_figures(x)["koleo_distance"] == pytest.approx(sum(distances) / 9, rel=1e-5)


def test_norm_outliers_are_counted_by_kind_and_leave_registers_out():
    norms = torch.ones(4, 1 + 2 + 5)
    norms[:, 1:3] = 100.0  # registers
    norms[0, 3] = 9.0
    norms[1, 0] = 3.9
    figures = norm_figures(norms, num_register_tokens=2)
    assert figures["patch_norm_outliers"] == pytest.approx(1 / 20)
    assert figures["patch_norm_max"] == pytest.approx(9)
    assert figures["cls_norm_outliers"] == 0
    assert figures["cls_norm_max"] == pytest.approx(3.9)


def test_token_norms_are_those_before_the_last_norm():
    from opendino.models.config import ViTConfig
    from opendino.models.vit import VisionTransformer

    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=2, num_register_tokens=4)
    model = VisionTransformer(config).eval()
    crops = torch.randn(5, 3, 28, 28)
    norms = token_norms(model, crops, limit=3)
    assert norms.shape == (3, 1 + 4 + 4)
    assert not norms.requires_grad
    torch.testing.assert_close(norms, model.blocks[0](model.prepare_tokens(crops[:3])).norm(dim=-1).detach())


def test_first_crops_of_micro_batches_are_one_row_an_image():
    # image 0 and 1 in the first micro-batch, 2 and 3 in the second; tens digit: which crop
    rows = torch.tensor([0, 1, 10, 11, 2, 3, 12, 13])[:, None]
    assert first_crops(rows, 2).flatten().tolist() == [0, 1, 2, 3]


def test_health_gives_every_figure_as_a_number():
    figures = health(torch.eye(8), torch.eye(8), token_norms=torch.ones(8, 5), micro_batches=2)
    assert set(figures) == {
        "teacher_entropy", "prototype_use", "prototypes_won", "feature_rank", "koleo_distance", "near_duplicates",
        "cls_norm_outliers", "cls_norm_max", "patch_norm_outliers", "patch_norm_max",
    }  # fmt: skip
    assert all(isinstance(v, (int, float)) for v in figures.values())


def test_two_crops_of_an_image_are_no_duplicates_of_each_other():
    images = torch.eye(4)
    assert health(torch.eye(8), torch.cat([images, images]))["near_duplicates"] == 0


def test_update_norm_equals_the_ratio_of_flat_norms():
    torch.manual_seed(0)
    networks = {"backbone": nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), "dino_head": nn.Linear(4, 3)}
    optimizer = torch.optim.AdamW([p for m in networks.values() for p in m.parameters()], lr=0.1)
    old = {k: nn.utils.parameters_to_vector(m.parameters()).detach().clone() for k, m in networks.items()}
    for p in networks["backbone"].parameters():
        p.grad = torch.randn_like(p)
    norm = UpdateNorm(networks)
    norm.before()
    optimizer.step()
    figures = norm.after()
    new = nn.utils.parameters_to_vector(networks["backbone"].parameters()).detach()
    expected = float((new - old["backbone"]).norm() / old["backbone"].norm())
    assert expected > 0.01
    assert figures["update_norm_backbone"] == pytest.approx(expected, rel=1e-5)
    assert figures["update_norm_dino_head"] == 0
    assert norm.after() == {}
