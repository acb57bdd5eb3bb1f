# SPDX-License-Identifier: Apache-2.0
"""What every test gets: a feature cache of its own."""

import pytest


@pytest.fixture(autouse=True)
def own_feature_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OPENDINO_FEATURES", str(tmp_path_factory.mktemp("features")))
