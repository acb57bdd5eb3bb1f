# SPDX-License-Identifier: Apache-2.0
"""Two processes against one: the collectives, and every part of a step that looks across the global batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from opendino.distributed import collectives as c
from opendino.pretrain.centering import MovingCenter, TargetRows, sinkhorn_knopp, sinkhorn_offsets
from opendino.pretrain.config import parse_config
from opendino.pretrain.depth import DepthDraws
from opendino.pretrain.heads import BatchNorm
from opendino.pretrain.losses import koleo_loss
from opendino.pretrain.optimizer import ema_update
from opendino.pretrain.student_teacher import Crops, StudentTeacher

WORLD, K, D, TEMP = 2, 7, 5, 0.06
CUTS = {"uneven": (5, 3), "empty": (0, 8)}
IMAGES = 6


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def data():
    torch.manual_seed(0)
    return {"z": unit(8, D), "prototypes": unit(K, D), "x": torch.randn(8, D, dtype=torch.float64), "probe": unit(8, D)}


def model(centering):
    config = parse_config(
        f"""
        model: {{patch_size: 7, embed_dim: 12, depth: 2, num_heads: 2, init_values: 0.7, drop_path_rate: 0.4}}
        crops: {{global_size: 14, local_size: 14, num_local: 2}}
        heads: {{num_prototypes: 10, hidden_dim: 8, bottleneck_dim: 5, separate: true, batch_norm: true}}
        loss: {{centering: {centering}}}
        """,
        "test",
    )
    torch.manual_seed(0)
    built = StudentTeacher(config).double()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return built


def crops():
    """All masked patches lie in the second half of the images."""
    torch.manual_seed(1)
    masks = torch.zeros(2 * IMAGES, 4, dtype=torch.bool)
    masks[4, 1] = masks[5, [0, 3]] = masks[11, [1, 2, 3]] = True
    big, small = torch.randn(2 * IMAGES, 3, 14, 14), torch.randn(2 * IMAGES, 3, 14, 14)
    return Crops(big.double(), small.double(), masks)


def step(centering, part, first):
    """Loss parts, gradients, centres and running statistics of the images of one process."""
    network = model(centering)
    [targets] = network.targets([part], TEMP)
    total, parts = network.loss(part, targets, DepthDraws(3, 4, first, part.num_images, IMAGES))
    total.backward()
    grads = {n: p.grad for n, p in network.student.named_parameters() if p.grad is not None}
    return {"parts": parts | {"loss": total.detach()}, "grads": grads, "buffers": dict(network.named_buffers())}


def of_process(rank):
    """Everything that one of the two processes computes."""
    values, out = data(), {}
    x = torch.arange(3.0) + 10 * rank
    out["sums"] = [c.world_size(), c.rank(), c.is_main(), c.all_sum(x), c.all_max(-x), x]
    out["flags"] = [c.all_true(True), c.all_true(rank == 0), c.broadcast_object({"rank": rank})]
    leaf = x.clone().requires_grad_()
    (c.all_sum_with_grad(leaf) * (rank + 1)).sum().backward()
    out["sum_grad"] = leaf.grad
    rows = x[:, None].clone().requires_grad_()
    gathered = c.gather_rows(rows)
    (gathered * torch.arange(6.0)[:, None] * (rank + 1)).sum().backward()
    out["gathered"], out["gather_grad"] = gathered.detach(), rows.grad
    for name, cut in CUTS.items():
        mine = {k: v.split(cut)[rank] for k, v in values.items() if k != "prototypes"}
        offsets = sinkhorn_offsets(mine["z"], values["prototypes"], TEMP, chunk=2)
        out[name, "sinkhorn"] = TargetRows(mine["z"], values["prototypes"], TEMP, offsets).probabilities()
        center, other = MovingCenter(K).double(), MovingCenter(K).double()
        center.update_rows(mine["z"], values["prototypes"])
        other.update(mine["z"] @ values["prototypes"].T)
        out[name, "centers"] = [center.center, other.center]
        norm, leaf = BatchNorm(D).double(), mine["x"].clone().requires_grad_()
        result = norm(leaf)
        (result * mine["probe"]).sum().backward()
        grads = [leaf.grad, c.all_sum(norm.weight.grad), c.all_sum(norm.bias.grad)]
        out[name, "norm"] = [result.detach(), *grads, norm.running_mean, norm.running_var]
    leaf = values["x"].chunk(2)[rank].clone().requires_grad_()
    loss = koleo_loss(leaf)
    loss.backward()
    out["koleo"] = [loss.detach(), leaf.grad]
    mesh = init_device_mesh("cpu", (WORLD,))
    teacher, student = (distribute_tensor(t, mesh, [Shard(0)]) for t in (values["z"].clone(), values["x"]))
    ema_update([teacher], [student], 0.75)
    out["average"] = teacher.full_tensor()
    for centering in ("sinkhorn", "moving"):
        out[centering] = step(centering, crops().split(2)[rank], rank * IMAGES // 2)
    return out


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save(of_process(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_collectives(found):
    for rank, out in enumerate(found):
        world, place, main, total, largest, untouched = out["sums"]
        assert (world, place, main) == (2, rank, rank == 0)
        assert total.tolist() == [10, 12, 14]
        assert largest.tolist() == [0, -1, -2]
        assert untouched.tolist() == [10 * rank + i for i in range(3)]
        assert out["flags"] == [True, False, {"rank": 0}]
        assert out["sum_grad"].tolist() == [3.0] * 3
        assert out["gathered"].flatten().tolist() == [0, 1, 2, 10, 11, 12]
        assert out["gather_grad"].flatten().tolist() == [3.0 * (3 * rank + i) for i in range(3)]


def test_one_process_gets_its_input_back():
    x = torch.randn(3, 2)
    assert all(f(x) is x for f in (c.all_sum, c.all_max, c.all_sum_with_grad, c.gather_rows))
    assert (c.world_size(), c.rank(), c.is_main(), c.all_true(False), c.broadcast_object(3)) == (1, 0, True, False, 3)


@pytest.mark.parametrize("cut", CUTS)
def test_sinkhorn_balances_the_rows_of_all_processes(cut, found):
    values = data()
    wanted = sinkhorn_knopp(values["z"] @ values["prototypes"].T, TEMP)
    rows = torch.cat([out[cut, "sinkhorn"] for out in found])
    torch.testing.assert_close(rows.float(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cut", CUTS)
def test_the_centre_moves_to_the_mean_of_all_rows(cut, found):
    values = data()
    mean = (values["z"] @ values["prototypes"].T).mean(0, keepdim=True)
    for out in found:
        for center in out[cut, "centers"]:
            torch.testing.assert_close(center, 0.1 * mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cut", CUTS)
def test_batch_norm_over_all_rows_in_value_gradient_and_running_statistics(cut, found):
    values, norm = data(), torch.nn.BatchNorm1d(D).double()
    x = values["x"].requires_grad_()
    result = norm(x)
    (result * values["probe"]).sum().backward()
    for i, wanted in enumerate((result, x.grad)):
        torch.testing.assert_close(torch.cat([out[cut, "norm"][i] for out in found]), wanted.detach())
    for out in found:
        same = [norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
        torch.testing.assert_close(out[cut, "norm"][2:], same)


def test_koleo_finds_neighbours_in_other_processes(found):
    x = data()["x"].requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert float(sum(out["koleo"][0] for out in found)) / 2 == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(torch.cat([out["koleo"][1] for out in found]) / 2, x.grad)


def test_the_moving_average_of_sharded_weights(found):
    values = data()
    for out in found:
        torch.testing.assert_close(out["average"], 0.75 * values["z"] + 0.25 * values["x"])


@pytest.mark.parametrize("centering", ["sinkhorn", "moving"])
def test_a_step_of_two_processes_equals_one_of_the_whole_batch(centering, found):
    """With stochastic depth, batch normalisation, and one process that has no masked patch."""
    whole = step(centering, crops(), 0)
    halves = [out[centering] for out in found]
    for name, value in whole["parts"].items():
        mean = sum(float(h["parts"][name]) for h in halves) / 2
        assert mean == pytest.approx(float(value), rel=1e-6, abs=1e-8), name
    assert float(halves[0]["parts"]["ibot"]) == 0
    for name, gradient in whole["grads"].items():
        mean = (halves[0]["grads"][name] + halves[1]["grads"][name]) / 2
        assert (mean - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, name
    for half in halves:
        assert set(half["grads"]) == set(whole["grads"])
        for name, buffer in whole["buffers"].items():
            torch.testing.assert_close(half["buffers"][name], buffer, rtol=1e-6, atol=1e-8)
