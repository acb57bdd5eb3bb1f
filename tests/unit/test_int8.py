# SPDX-License-Identifier: Apache-2.0
"""The int8 feed-forward kernel does what whole numbers say, and a model with it gives nearly the fp32 vectors."""

import math

import numpy as np
import pytest
import torch

from opendino.embed.embedder import Embedder
from opendino.embed.runtimes import int8 as runtimes
from opendino.embed.runtimes.agreement import Agreement, agreement, nearest, vote
from opendino.embed.runtimes.int8 import Int8Runtime, Int8ViT
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.embed.runtimes.rounding import round_for
from opendino.errors import ConfigError, DataError
from opendino.evaluate.knn import knn_predict
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.native.build import Kernels, kernels
from opendino.native.int8 import PackedLinear, add_feed_forward, int8_supported, quantise_weight

LIBRARY = kernels().library
needs_vnni = pytest.mark.skipif(not int8_supported(LIBRARY), reason="this processor has no AVX-512 VNNI")
SIZES = {"even": (32, 64, 32), "odd": (10, 50, 30), "one panel and a bit": (7, 33, 17)}


def run(x, first, second, dim, gated=False, skipped=0, threads=1, most_noise=1.0):
    stream = torch.zeros(*x.shape[:2], dim)
    options = {"gated": gated, "skipped": skipped, "threads": threads, "most_noise": most_noise}
    coarse = add_feed_forward(LIBRARY, x.bfloat16(), stream, first, second, **options)
    assert not stream[coarse].any()
    return stream


def act(y):
    return y * 0.5 * (1 + math.erf(y / math.sqrt(2)))


def literally(x, w1, s1, b1, w2, s2, b2, gated):
    """One token, number by number: 8-bit activations, whole-number sums."""

    def layer(values, w, scale, bias):
        low, step = min(values), (max(values) - min(values)) / 255
        q = [round((v - low) / step) for v in values]
        assert all(0 <= i <= 255 for i in q)
        return [
            s * (step * sum(int(i) * int(j) for i, j in zip(q, row, strict=True)) + low * sum(map(int, row))) + b
            for row, s, b in zip(w, scale, bias, strict=True)
        ]

    y = layer(x, w1, s1, b1)
    half = len(y) // 2
    hidden = [g / (1 + math.exp(-g)) * v for g, v in zip(y[:half], y[half:], strict=True)] if gated else map(act, y)
    return layer(list(hidden), w2, s2, b2)


@needs_vnni
@pytest.mark.parametrize("size", SIZES)
def test_whole_numbers_come_out_exactly(size):
    k, hidden, dim = SIZES[size]
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.integers(0, 256, (2, 9, k)))
    x[..., 0], x[..., 1] = 0, 255
    picks = torch.tensor([i % k for i in range(hidden)])
    one_hot = torch.zeros(hidden, k, dtype=torch.int8)
    one_hot[torch.arange(hidden), picks] = 1
    first = PackedLinear(one_hot, torch.ones(hidden), torch.full((hidden,), 1024.0))  # GELU leaves 1024 + x alone
    weight = torch.tensor(rng.choice([-127, -1, 0, 3, 127], (dim, hidden)), dtype=torch.int8)
    weight[0], weight[1] = 127, -127  # the largest sums
    bias = torch.tensor(rng.integers(-9, 9, dim)).float()
    found = run(x, first, PackedLinear(weight, torch.ones(dim), bias, inputs=first.gives), dim).double()
    exact = (x[..., picks] + 1024) @ weight.long().T + bias.long()
    # GELU's 1e-5 is the same factor for all of them
    factor = float((found * exact).sum() / (exact.double() ** 2).sum())
    assert abs(factor - 1) < 2e-5
    assert ((found / factor).round() - exact).abs().max() <= exact.abs().max() * 3e-6


@needs_vnni
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equals_a_literal_loop(size, gated):
    k, hidden, dim = SIZES[size]
    torch.manual_seed(0)
    x = (torch.randn(2, 8, k) * 2 + 0.5).bfloat16()
    w1, s1 = quantise_weight(torch.randn(hidden * (2 if gated else 1), k) / k**0.5)
    w2, s2 = quantise_weight(torch.randn(dim, hidden) / hidden**0.5)
    b1, b2 = torch.randn(len(w1)), torch.randn(dim)
    first = PackedLinear(w1, s1, b1, gated=gated)
    found = run(x, first, PackedLinear(w2, s2, b2, inputs=first.gives), dim, gated).flatten(0, 1)
    rows = [literally(*(t.tolist() for t in (r.float(), w1, s1, b1, w2, s2, b2)), gated) for r in x.flatten(0, 1)]
    apart = (found - torch.tensor(rows)).abs()
    assert apart.max() < 0.05  # a hidden value at a tie may be rounded the other way
    assert apart.median() < 3e-5


@needs_vnni
def test_the_activation_is_gelu_to_its_tails():
    y = torch.linspace(-9, 9, 2000).bfloat16().float().sort().values.reshape(-1, 1, 1)
    two = torch.cat([y, torch.zeros_like(y)], 2)
    # hidden values are y and -y: GELU of one is the token's lowest value and of the other its highest
    first = PackedLinear(torch.tensor([[127, 0], [-127, 0]], dtype=torch.int8), torch.full((2,), 1 / 127), None)
    second = PackedLinear(torch.eye(2, dtype=torch.int8), torch.ones(2), None, inputs=first.gives)
    found = run(two, first, second, 2)[:, 0]
    exact = torch.nn.functional.gelu(torch.cat([y, -y], 2)[:, 0].double())
    assert ((found - exact).abs() / two.abs().amax(2).clamp_min(1)).max() < 1e-5


@needs_vnni
def test_first_tokens_are_skipped_and_threads_share_the_others():
    torch.manual_seed(0)
    x, dim = torch.randn(3, 300, 64), 64
    first = PackedLinear(*quantise_weight(torch.randn(256, 64)), None)
    second = PackedLinear(*quantise_weight(torch.randn(dim, 256)), None, inputs=first.gives)
    all_of_them, some = run(x, first, second, dim), run(x, first, second, dim, skipped=5)
    assert not some[:, :5].any()
    assert torch.equal(some[:, 5:], all_of_them[:, 5:])
    torch.set_num_threads(3)
    try:
        assert torch.equal(run(x, first, second, dim, skipped=5, threads=3), some)
    finally:
        torch.set_num_threads(1)


@needs_vnni
def test_a_constant_token_and_one_that_is_not_finite():
    x = torch.stack([torch.full((32,), 3.0), torch.full((32,), float("nan")), torch.arange(32.0)])[None]
    first = PackedLinear(*quantise_weight(torch.eye(32)), None)
    second = PackedLinear(*quantise_weight(torch.eye(32)), None, inputs=first.gives)
    out = run(x, first, second, 32)[0]
    assert (out[0] - act(3)).abs().max() < 1e-4
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


@needs_vnni
def test_tokens_with_too_much_noise_are_named_and_left_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 20, 512).bfloat16()
    x[1, 7, 3], x[0, 5, 100] = 200, 15  # 200 leaves the others a handful of levels, 15 a good many
    first = PackedLinear(*quantise_weight(torch.randn(1024, 512) / 20), None)
    second = PackedLinear(*quantise_weight(torch.randn(64, 1024) / 30), None, inputs=first.gives)
    stream = torch.zeros(2, 20, 64)
    coarse = add_feed_forward(LIBRARY, x, stream, first, second, gated=False, skipped=1, threads=1)
    noise = (x.float().amax(2) - x.float().amin(2)) / 255 / 12**0.5 / x.float().square().mean(2).sqrt()
    assert (noise > 0.02).nonzero().tolist() == coarse.nonzero().tolist() == [[1, 7]]
    assert not stream[1, 7].any()
    assert (stream[:, 1:].abs().amax(2) > 0).sum() == 2 * 19 - 1
    large_hidden = torch.randn(1024, 512) / 20
    large_hidden[5] *= 100
    first = PackedLinear(*quantise_weight(large_hidden), None)
    some, stream = x[:, :5].contiguous(), torch.zeros(2, 5, 64)
    coarse = add_feed_forward(LIBRARY, some, stream, first, second, gated=False, skipped=0, threads=1)
    hidden = torch.nn.functional.gelu(some.float() @ large_hidden.T)
    noise = (hidden.amax(2) - hidden.amin(2)) / 255 / 12**0.5 / hidden.square().mean(2).sqrt()
    assert 0 < (noise > 0.02).sum() < 10
    assert torch.equal(coarse, noise > 0.02)


def make_model(**overrides):
    torch.manual_seed(0)
    model = VisionTransformer(
        ViTConfig(**{"img_size": 56, "embed_dim": 128, "depth": 2, "num_heads": 2, "init_values": 0.5, **overrides})
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "weight" in name:
                parameter.mul_(3)
    return model


MODELS = {
    "mlp": {},
    "registers": {"num_register_tokens": 4},
    "swiglu": {"ffn": "swiglu", "depth": 3},
    "odd width": {"embed_dim": 40},
    "no LayerScale": {"init_values": None, "qkv_bias": False},
}


@needs_vnni
@pytest.mark.parametrize("shape", MODELS)
def test_a_model_in_int8_is_close_to_fp32(shape):
    model = make_model(**MODELS[shape])
    images = [torch.randn(3, 3, 84, 56) for _ in range(2)]
    close = agreement(Int8Runtime(model), TorchRuntime(model), images)
    assert close.images == 6
    assert close.cls < 1e-3
    assert close.cls_mean < 3e-4
    assert close.patches < 3e-4


@needs_vnni
def test_a_model_with_large_channels_is_close_too(monkeypatch):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[3] *= 60
        model.blocks[0].mlp.fc2.weight[:, 3] /= 20
    images = [torch.randn(4, 3, 84, 56)]
    close = agreement(Int8Runtime(model), TorchRuntime(model), images)
    assert close.patches < 1e-4
    monkeypatch.setattr(runtimes, "add_feed_forward", lambda *a, **k: add_feed_forward(*a, **k, most_noise=1.0))
    assert agreement(Int8Runtime(model), TorchRuntime(model), images).patches > 3 * close.patches


@needs_vnni
def test_without_bf16_products_the_rest_is_fp32(monkeypatch):
    monkeypatch.setattr(runtimes, "attention_supported", lambda library: False)
    model = make_model()
    runtime = Int8Runtime(model)
    close = agreement(runtime, TorchRuntime(model), [torch.randn(4, 3, 84, 56)])
    assert runtime._prepare().precision == "fp32"
    assert close.cls < 1e-3
    assert close.patches < 2e-4


@needs_vnni
def test_layers_and_rows_do_not_depend_on_their_batch():
    model = make_model(depth=3)
    images = torch.randn(3, 3, 56, 56)
    ready = Int8ViT(model)
    whole = ready.tokens(images, layers=2)
    assert whole.shape == (3, 17, 256)
    torch.testing.assert_close(ready.tokens(images[1:2], layers=2)[0], whole[1], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(ready.tokens(images)[..., :], whole[..., 128:])


@needs_vnni
def test_an_embedder_in_int8_says_so_and_sees_later_changes_of_the_weights():
    model = make_model()
    embedder = Embedder(model, precision="int8", size=56)
    assert (embedder.precision, embedder.runtime.name) == ("int8", "torch")
    picture = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    before = embedder([picture]).cls
    np.testing.assert_allclose(before, Embedder(model, size=56)([picture]).cls, atol=0.2)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    assert np.abs(embedder([picture]).cls - before).max() > 0.3


def test_what_cannot_be_in_int8_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"fp32 weights on the CPU.*torch.bfloat16"):
        Embedder(make_model().bfloat16(), precision="int8")
    monkeypatch.setattr(runtimes, "int8_supported", lambda library: False)
    with pytest.raises(ConfigError, match=r"no AVX-512 VNNI.*bf16.*opendino export onnx --precision int8"):
        Embedder(make_model(), precision="int8")
    monkeypatch.setattr(runtimes, "kernels", lambda: Kernels(None, "there is no compiler."))
    with pytest.raises(ConfigError, match=r"here: there is no compiler\. Use bf16"):
        Embedder(make_model(), precision="int8")


class Given:
    """A runtime that gives prepared vectors."""

    def __init__(self, cls):
        self.cls = cls

    def vectors(self, images, layers, what):
        cls = self.cls[images.long()]
        return {"cls": cls, "patches": torch.stack([cls, cls], 1)}


def test_agreement_counts_neighbours_and_votes_as_knn_does():
    torch.manual_seed(0)
    exact = torch.randn(60, 8)
    other = exact + 0.3 * torch.randn(60, 8)
    labels = torch.randint(0, 3, (60,))
    images = torch.arange(60).split(7)
    close = agreement(Given(other), Given(exact), images, labels, k=5)
    cosine = torch.nn.functional.cosine_similarity(other.double(), exact.double())
    assert close.cls == pytest.approx(float(1 - cosine.min()), abs=1e-6)
    assert close.cls_mean == close.patches == pytest.approx(float(1 - cosine.mean()), abs=1e-6)
    answers, shared = [], []
    for i in range(60):
        rest = [j for j in range(60) if j != i]
        answers.append([int(knn_predict(v[rest], labels[rest], v[i : i + 1], k=5)) for v in (other, exact)])
        near = [
            {rest[j] for j in torch.cosine_similarity(v[rest], v[i : i + 1]).topk(5).indices} for v in (other, exact)
        ]
        shared.append(len(near[0] & near[1]) / 5)
    assert close.neighbours == pytest.approx(np.mean(shared))
    assert close.votes == pytest.approx(np.mean([a == b for a, b in answers]))
    assert "k-NN answers" in str(close)
    same = agreement(Given(exact), Given(exact), images)
    assert (same.cls, same.neighbours, same.votes) == (0, 1, None)


def test_agreement_takes_few_images_and_refuses_one():
    found = agreement(Given(torch.eye(3)), Given(torch.eye(3)), [torch.arange(3)])
    assert found.neighbours == 1
    with pytest.raises(DataError, match="1 images; give at least 2"):
        agreement(Given(torch.eye(3)), Given(torch.eye(3)), [torch.arange(1)])
    with pytest.raises(DataError, match="2 labels for 3 images"):
        agreement(Given(torch.eye(3)), Given(torch.eye(3)), [torch.arange(3)], [0, 1])
    bad = torch.tensor([[1.0, 0], [float("nan"), 0]])
    assert agreement(Given(bad), Given(torch.eye(2)), [torch.arange(2)]).cls == float("inf")


def test_neighbours_and_votes_by_hand():
    vectors = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert nearest(vectors, 1)[1].flatten().tolist() == [1, 0, 3, 2]
    similar, number = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[0, 1, 2]])
    assert vote(similar, number, torch.tensor([0, 1, 1])).item() == 0  # e^(0.1/0.07) is more than 2
    assert vote(similar, number, torch.tensor([1, 1, 0])).item() == 1


def test_rounding_for_inputs_changes_the_outputs_less_and_no_weight_by_much():
    torch.manual_seed(0)
    inputs = torch.randn(400, 200) @ torch.randn(200, 200) / 14  # correlated channels, more than one group of columns
    inputs[:, 7] = 0  # a channel that is never used
    weight = torch.randn(30, 200)
    exact = inputs @ weight.T

    def error(rounded):
        return float((inputs @ (rounded[0].float() * rounded[1][:, None]).T - exact).square().mean())

    nearest_one, fitted = quantise_weight(weight), round_for(weight, inputs)
    assert torch.equal(nearest_one[1], fitted[1])
    assert error(fitted) < 0.5 * error(nearest_one)
    assert (nearest_one[0].int() - fitted[0].int()).abs().max() < 20
    assert fitted[0].abs().max() <= 127


def test_rounding_equals_the_recursion_without_groups():
    torch.manual_seed(0)
    weight, inputs = torch.randn(4, 150), torch.randn(300, 150)
    rounded, scale = round_for(weight, inputs)
    moments = (inputs.T @ inputs).double()
    inverse = torch.linalg.inv(moments + 0.01 * moments.diagonal().mean() * torch.eye(150))
    left, found = weight.double(), torch.zeros(4, 150)
    for k in range(150):  # the inverse of the moments of the channels from k on: the textbook's own form
        found[:, k] = (left[:, k] / scale).round().clamp(-127, 127)
        error = (left[:, k] - found[:, k] * scale) / inverse[0, 0]
        left[:, k:] -= error[:, None] * inverse[0]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
    assert (found == rounded).float().mean() > 0.995  # ties of fp32


def test_rounding_for_inputs_that_are_not_finite_is_to_the_nearest():
    weight, inputs = torch.randn(4, 6), torch.full((9, 6), float("nan"))
    assert torch.equal(round_for(weight, inputs)[0], quantise_weight(weight)[0])


@needs_vnni
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_calibration_brings_vectors_nearer_to_fp32(ffn):
    model = make_model(ffn=ffn).train()
    images = torch.nn.functional.interpolate(torch.randn(40, 3, 6, 6), size=(56, 56), mode="bicubic")
    runtime = Int8Runtime(model)
    before = agreement(runtime, TorchRuntime(model), [images[32:]])
    assert runtime.identity() == {}
    runtime.calibrate(images)
    assert model.training
    after = agreement(runtime, TorchRuntime(model), [images[32:]])
    assert after.patches < 0.95 * before.patches
    assert set(runtime.identity()) == {"calibration_sha256"}
    assert runtime.calibration.shape[0] == 32


@needs_vnni
def test_an_embedder_takes_calibration_images_and_says_what_it_cannot_use(tmp_path, caplog):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (60, 70, 3), dtype=np.uint8) for _ in range(3)]
    model = make_model()
    embedder = Embedder(model, precision="int8", size=56, calibration=[*pictures, tmp_path / "none.jpg"])
    assert embedder.runtime.calibration.shape == (3, 3, 56, 56)
    assert "1 of 4 calibration images could not be read" in caplog.text
    np.testing.assert_allclose(embedder(pictures).cls, Embedder(model, size=56)(pictures).cls, atol=0.2)
    with pytest.raises(ConfigError, match=r"precision is 'fp32'.*needs none"):
        Embedder(model, size=56, calibration=pictures)
    with pytest.raises(DataError, match="None of the 1 calibration images"):
        Embedder(model, precision="int8", size=56, calibration=[tmp_path / "none.jpg"])


def test_the_floor_refuses_each_of_its_three_figures():
    good = {"images": 1000, "cls": 1e-4, "cls_mean": 1e-5, "patches": 1e-5, "neighbours": 1.0, "votes": 0.996}
    assert runtimes.too_far(Agreement(**good)) is None
    assert "worst cls token is 4.0e-04" in runtimes.too_far(Agreement(**good | {"cls": 4e-4}))
    assert "worst cls token" in runtimes.too_far(Agreement(**good | {"cls": float("nan")}))
    assert "patches is 6.0e-05" in runtimes.too_far(Agreement(**good | {"patches": 6e-5}))
    assert "99.40% of the k-NN answers" in runtimes.too_far(Agreement(**good | {"votes": 0.994}))
    assert runtimes.too_far(Agreement(**good | {"votes": 0.994, "images": 999})) is None


@needs_vnni
def test_adapters_are_refused_and_not_passed_over():
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = make_model()
    model.blocks[1].mlp.fc1 = Adapted(*model.blocks[1].mlp.fc1.weight.shape[::-1])
    with pytest.raises(ConfigError, match="layers of another kind"):
        Embedder(model, precision="int8", size=56)
    with pytest.raises(ConfigError, match="not this package's own"):
        Embedder(model, runtime="torch-prepared", size=56)


@needs_vnni
def test_a_model_made_in_inference_mode_runs_in_int8_too():
    with torch.inference_mode():
        model = make_model()
    picture = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    assert np.isfinite(Embedder(model, precision="int8", size=56)([picture]).cls).all()
