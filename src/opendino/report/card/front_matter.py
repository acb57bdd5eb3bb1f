# SPDX-License-Identifier: Apache-2.0
"""The YAML block at the top of a card, in the keys that model hubs read."""

from __future__ import annotations

import re
from typing import Any

import yaml

UNKNOWN = "unknown"
"""What hubs take for a licence that is not stated."""
HUB_LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0
    cc-by-3.0 cc-by-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-2.0 ecl-2.0 epl-2.0 eupl-1.1
    gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ncsa odbl openrail pddl unlicense wtfpl zlib
    """.split()  # noqa: SIM905
)
"""Identifiers that hubs know; another licence is "other" with its name."""


def front_matter(facts: dict[str, Any]) -> dict[str, Any]:
    """Give the metadata of a card; what is not known has no key, but for the licence, which is "unknown"."""
    data: dict[str, Any] = licence_keys(facts["licence"])
    data |= {"library_name": "opendino", "pipeline_tag": "image-feature-extraction", "tags": tags(facts)}
    if facts.get("base_model"):
        data["base_model"] = facts["base_model"]
    impact = facts["impact"]
    if impact["co2_kg"] is not None:
        data["co2_eq_emissions"] = {
            "emissions": round(impact["co2_kg"] * 1000, 3),
            "source": "opendino card: " + "; ".join(impact["assumptions"]),
            "training_type": "pre-training" if facts["kind"] == "pretrained" else "fine-tuning",
        } | {
            key: value
            for key, value in (("geographical_location", facts["region"]), ("hardware_used", facts["hardware"]))
            if value
        }
    if facts["evaluation"]["columns"]:
        data["model-index"] = [{"name": facts["name"], "results": results(facts["evaluation"]["columns"])}]
    return data


def licence_keys(licence: str | None) -> dict[str, str]:
    """Give a licence as hubs want it: an identifier of theirs, or "other" with the name."""
    if not licence:
        return {"license": UNKNOWN}
    if licence.lower() in HUB_LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+-]+", "-", licence.lower()).strip("-")}


def tags(facts: dict[str, Any]) -> list[str]:
    """Give words by which the model is found."""
    shape = facts["model"]["config"]
    kind = "self-supervised-learning" if facts["kind"] == "pretrained" else "fine-tuned"
    return ["opendino", "dinov2", "vision-transformer", "image-features", kind, f"patch-{shape['patch_size']}"]


def results(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the figures as the results of a model index, those of one task and set together."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for column in columns:
        place = found.setdefault(
            (column["task"], column["data"]),
            {
                "task": {"type": column["task"]},
                "dataset": {"name": column["data"], "type": re.sub(r"[^A-Za-z0-9._/-]+", "-", column["data"]).lower()},
                "metrics": [],
            },
        )
        name = f"{column['title']}: {column['metric_name']}"
        place["metrics"].append({"type": column["metric"], "name": name, "value": round(column["value"], 4)})
    return list(found.values())


def as_block(data: dict[str, Any]) -> str:
    """Write metadata as a block between two lines of three hyphens."""
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)}---\n"
