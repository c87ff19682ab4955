"""`cluster.yaml` is a cluster file in Ray's own eyes, for one node, bound to loopback."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start, stop

PATH = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The file as `ray up` sees it, with Ray's defaults filled in."""
    prepared: dict[str, Any] = prepare_config(yaml.safe_load(PATH.read_text()))
    return prepared


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_ray_refuses_the_file_with_a_misspelt_key(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_wokers"):
        validate_config({**cluster, "max_wokers": 0})


def test_it_is_one_node(cluster: dict[str, Any]) -> None:
    assert cluster["max_workers"] == 0
    assert cluster["provider"]["worker_ips"] == []


def test_ray_is_started_with_options_that_exist_and_on_loopback(cluster: dict[str, Any]) -> None:
    stopping, starting = cluster["head_start_ray_commands"]
    assert stopping.endswith("/ray stop")
    stop.make_context("stop", [])
    words = shlex.split(starting)
    # Only parsed: nothing is started.
    options = start.make_context("start", words[words.index("start") + 1 :]).params
    assert options["head"] is True
    assert options["node_ip_address"] == "127.0.0.1"
    assert options["dashboard_host"] == "127.0.0.1"
    assert options["num_gpus"] == 1
