# SPDX-License-Identifier: Apache-2.0
"""A run on 16-bit images of five channels, in a folder and in tar shards, with the statistics of the command."""

import io
import tarfile

import numpy as np
import yaml

import opendino
from opendino.cli import main
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.trainer import Trainer


def save_images(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        for i in range(6):
            array = rng.integers(0, 65536, (24, 20, 5), dtype=np.uint16)
            np.save(folder / f"{i}.npy", array)
            out = io.BytesIO()
            np.save(out, array)
            info = tarfile.TarInfo(f"{i}.npy")
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))


def test_five_channels_of_sixteen_bits_train(tmp_path, capsys):
    save_images(tmp_path / "fields")
    assert main(["stats", str(tmp_path / "fields.tar"), "--channels", "5"]) == 0
    crops = yaml.safe_load(capsys.readouterr().out)["crops"]
    assert np.allclose(crops["mean"], 0.5, atol=0.02)
    losses = {}
    for name in ("fields", "fields.tar"):
        config = PretrainConfig(
            data=str(tmp_path / name), out=str(tmp_path / f"run-{name}"), steps=2, batch_size=6, num_workers=1,
            model={"in_chans": 5, "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 7},
            crops={**crops, "global_size": 28, "local_size": 14, "num_local": 2},
            heads={"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8},
        )  # fmt: skip
        record = Trainer(config).train()
        assert np.isfinite(record["loss"])
        assert record["image_errors"] == 0
        losses[name] = record["loss"]
    assert losses["fields"] != losses["fields.tar"]  # another order: shards are shuffled in windows
    assert opendino.load(str(tmp_path / "run-fields")).config.in_chans == 5
