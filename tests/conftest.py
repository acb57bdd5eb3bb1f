# SPDX-License-Identifier: Apache-2.0
"""What every test gets: a feature cache of its own, and calibrations that are not the user's."""

import pytest


@pytest.fixture(autouse=True)
def own_feature_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OPENDINO_FEATURES", str(tmp_path_factory.mktemp("features")))
    monkeypatch.setenv("OPENDINO_CALIBRATIONS", str(tmp_path_factory.getbasetemp() / "calibrations"))
