"""The dashboard in docs/ asks for what /metrics has, and is laid out as Grafana wants it."""

import itertools
import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from atom.entrypoints.openai.metrics import Metrics

DASHBOARD = json.loads((Path(__file__).parents[3] / "docs" / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
METRIC = re.compile(r"\batom:\w+")


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Names of samples, and their labels."""
    names: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(Metrics("some model").exposition().decode()):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_expression_names_what_is_exposed(exposed, title, expression):
    names = METRIC.findall(expression)
    assert names, title
    for name, labels in re.findall(r"(atom:\w+)\{([^}]*)\}", expression):
        assert name in exposed
        # The scraper adds instance.
        assert set(re.findall(r"(\w+)=~?\"", labels)) <= exposed[name] | {"instance"}
    for labels in re.findall(r"by \((.*?)\)", expression):
        assert {label.strip() for label in labels.split(",")} <= exposed[names[0]] | {"instance"}
    for name in names:
        assert name + "{" in expression, "every metric is narrowed to the chosen model and server"
        counts = name.endswith(("_total", "_bucket"))
        assert counts == bool(re.search(rf"(rate|increase)\({name}\{{", expression)), "of counters, how fast they grow"
    assert expression.count("(") == expression.count(")")


def test_dashboard_shows_the_vital_metrics():
    shown = {name for _, expression in EXPRESSIONS for name in METRIC.findall(expression)}
    vital = """
        num_requests_running num_requests_waiting prompt_tokens_total generation_tokens_total kv_cache_usage_perc
        time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket e2e_request_latency_seconds_bucket
        prefix_cache_hits_total prefix_cache_queries_total num_preemptions_total request_success_total engine_up
    """
    assert {f"atom:{name}" for name in vital.split()} <= shown


def test_dashboard_can_be_imported_anywhere(exposed):
    assert DASHBOARD["id"] is None
    assert VARIABLES["datasource"]["type"] == "datasource"
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        assert panel["description"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert {name for name in used if not name.startswith("__")} <= set(VARIABLES)
    for name in METRIC.findall(json.dumps(DASHBOARD["templating"])):
        assert name in exposed


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    boxes = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    for a, b in itertools.combinations(boxes, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)
