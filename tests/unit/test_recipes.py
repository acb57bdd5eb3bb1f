# SPDX-License-Identifier: Apache-2.0
"""The published constants, and what a wrong setting says."""

import pytest

from opendino.errors import ConfigError
from opendino.pretrain.config import list_recipes, load_recipe, parse_config
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.stages import timeline

EPOCH = 1250


def test_all_recipes_are_there():
    assert list_recipes() == [
        "vitb14",
        "vitg14",
        "vitl14_highres",
        "vitl14_long",
        "vitl14_short",
        "vitl14_staged",
        "vits14",
        "vits14_continue",
        "vits14_highres",
        "vits14_staged",
        "vitt14_continue",
        "vitt14_demo",
        "vitt14_demo_open",
        "vitt14_mixture",
        "vitt14_open_1",
        "vitt14_open_2",
        "vitt14_open_3",
        "vitt14_open_4",
        "vitt14_open_5",
        "vitt14_open_6",
        "vitt14_open_7",
        "vitt14_open_8",
        "vitt7_fashion",
    ]


@pytest.mark.parametrize("name", ["vits14", "vitb14", "vitl14_short", "vitl14_long", "vitg14"])
def test_what_all_published_recipes_share(name):
    c = load_recipe(name)
    assert c.recipe == name
    crops = c.crops
    assert (crops.global_size, crops.local_size, crops.num_local) == (224, 98, 8)
    assert tuple(crops.global_scale) == (0.32, 1.0)
    assert tuple(crops.local_scale) == (0.05, 0.32)
    assert tuple(crops.jitter) == (0.4, 0.4, 0.2, 0.1)
    assert (crops.jitter_prob, crops.grey_prob, crops.solarize_prob) == (0.8, 0.2, 0.2)
    assert tuple(crops.blur_probs) == (1.0, 0.1, 0.5)
    assert tuple(crops.blur_sigma) == (0.1, 2.0)
    assert (c.masks.share, tuple(c.masks.ratio)) == (0.5, (0.1, 0.5))
    loss, optim = c.loss, c.optim
    assert (loss.dino_weight, loss.ibot_weight, loss.koleo_weight) == (1.0, 1.0, 0.1)
    assert (loss.student_temp, loss.warmup_teacher_temp, loss.teacher_temp) == (0.1, 0.04, 0.07)
    assert loss.warmup_teacher_temp_steps == 30 * EPOCH
    assert (
        loss.centering == "sinkhorn" if "long" in name or name == "vitg14" else loss.centering in ("sinkhorn", "moving")
    )
    assert optim.lr_rule == "sqrt_wrt_1024"
    assert (optim.min_lr, optim.clip_grad, optim.patch_embed_lr_mult) == (1e-6, 3.0, 0.2)
    assert (optim.weight_decay, tuple(optim.betas)) == (0.04, (0.9, 0.999))
    assert optim.freeze_last_layer_steps == EPOCH
    assert optim.momentum_end == 1.0
    assert c.model.init_values == 1e-5
    assert (c.heads.hidden_dim, c.heads.bottleneck_dim, c.heads.num_layers) == (2048, 256, 3)
    assert not c.heads.batch_norm


def test_the_short_and_the_long_recipe():
    short, long, giant = (load_recipe(n) for n in ("vitl14_short", "vitl14_long", "vitg14"))
    assert (short.optim.lr, long.optim.lr, giant.optim.lr) == (4e-3, 2e-4, 2e-4)
    assert (short.optim.warmup_steps, long.optim.warmup_steps) == (10 * EPOCH, 80 * EPOCH)
    assert (short.optim.weight_decay_end, long.optim.weight_decay_end) == (0.4, 0.2)
    assert (short.optim.layerwise_decay, long.optim.layerwise_decay) == (0.9, 1.0)
    assert (short.heads.num_prototypes, long.heads.num_prototypes) == (65_536, 131_072)
    assert (short.heads.separate, long.heads.separate, giant.heads.separate) == (False, True, True)
    assert (short.optim.momentum, long.optim.momentum, giant.optim.momentum) == (0.992, 0.992, 0.994)
    assert (long.model.drop_path_rate, giant.model.drop_path_rate) == (0.3, 0.4)
    assert giant.heads.dino_bottleneck_dim == 384
    assert (short.model.arch, giant.model.arch) == ("vitl14", "vitg14")


def test_another_length_compresses_the_warm_ups():
    base = load_recipe("vitl14_short")
    half = with_steps(base, base.steps // 2)
    assert half.optim.warmup_steps == base.optim.warmup_steps // 2
    assert half.loss.warmup_teacher_temp_steps == base.loss.warmup_teacher_temp_steps // 2
    assert half.optim.freeze_last_layer_steps == base.optim.freeze_last_layer_steps // 2


@pytest.mark.parametrize(
    ("arch", "main", "lr", "warm_ups"),
    [("vits14", "vits14", 1e-3, (1000, 3000, 100)), ("vitl14", "vitl14_long", 5e-5, (1600, 600, 20))],
)
def test_the_high_resolution_stage_is_the_main_run_compressed(arch, main, lr, warm_ups):
    first, second = (s.config for s in timeline(load_recipe(f"{arch}_staged")))
    names = {"recipe": f"{arch}_staged"}
    assert first == load_recipe(main).model_copy(update=names)
    alone = load_recipe(f"{arch}_highres")
    assert second == alone.model_copy(update=names)
    assert (alone.steps, alone.crops.global_size, alone.crops.local_size, alone.optim.lr) == (10_000, 518, 98, lr)
    found = alone.optim.warmup_steps, alone.loss.warmup_teacher_temp_steps, alone.optim.freeze_last_layer_steps
    assert found == warm_ups


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", "unknown setting 'stepz', did you mean 'steps'"),
        ("optim: {lrr: 3}", "unknown setting 'optim.lrr', did you mean 'optim.lr'"),
        ("steps: many", "steps: .*integer.*got 'many'"),
        ("steps: 0", "steps: .*greater than or equal to 1"),
        ("{batch_size: 6, accumulate: 4}", "multiple of accumulate 4"),
        ("masks: {ratio: [0.5, 0.1]}", "rising"),
        ("optim: {betas: [0.9, 1.0]}", "betas"),
        ("- 1\n- 2", "settings as `key: value`, got list"),
        ("a: b: c", "no.* valid YAML|not valid YAML"),
    ],
)
def test_wrong_settings_are_one_paragraph(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(text, "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_unknown_recipes_and_files(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'vitl14_long'"):
        load_recipe("vitl14_lon")
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("steps: 7")
    assert load_recipe(str(tmp_path / "mine.yaml")).steps == 7
