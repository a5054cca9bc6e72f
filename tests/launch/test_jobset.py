"""launch/k8s/jobset.yaml: valid against the schema, and the parts that must agree with each other do.

The schema (jobset.schema.json) says where it comes from. No cluster is asked.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.launch.scripts import ROOT

SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
MANIFEST: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "k8s" / "jobset.yaml").read_text())
REPLICATED = MANIFEST["spec"]["replicatedJobs"][0]
JOB = REPLICATED["template"]["spec"]
POD = JOB["template"]["spec"]
TRAINER = POD["containers"][0]


def option(name: str) -> str:
    """The value after `name` in the container's arguments."""
    return str(TRAINER["args"][TRAINER["args"].index(name) + 1])


def test_manifest_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(MANIFEST, SCHEMA)


@pytest.mark.parametrize("path", [("spec",), ("spec", "failurePolicy"), ("spec", "replicatedJobs", 0, "template")])
def test_schema_refuses_a_misspelled_field(path: tuple[str | int, ...]) -> None:
    broken: Any = copy.deepcopy(MANIFEST)
    inner = broken
    for step in path:
        inner = inner[step]
    inner["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(broken, SCHEMA)


def test_exit_codes_lead_to_the_right_action() -> None:
    """JobSet sees only the message of the Job controller, which counts podFailurePolicy's rules."""
    pod_rules = JOB["podFailurePolicy"]["rules"]
    action_of: dict[str, str] = {}
    for index, pod_rule in enumerate(pod_rules):
        codes = pod_rule.get("onExitCodes", {}).get("values", ["disruption"])
        message = f"Container trainer for pod default/x failed with exit code 7 matching FailJob rule at index {index}"
        for rule in MANIFEST["spec"]["failurePolicy"]["rules"]:
            if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
                action_of.update({str(code): rule["action"] for code in codes})
                break
    assert action_of == {
        "85": "RestartJobSetAndIgnoreMaxRestarts",
        "2": "FailJobSet",
        "disruption": "RestartJobSetAndIgnoreMaxRestarts",
    }


def test_number_of_nodes_agrees() -> None:
    environment = {item["name"]: item.get("value") for item in TRAINER["env"]}
    assert JOB["parallelism"] == JOB["completions"] == int(environment["NUM_NODES"])
    assert JOB["completionMode"] == "Indexed", "without an index a pod has no node rank"
    assert option("--nnodes") == "$(NUM_NODES)"
    assert option("--node-rank") == "$(NODE_RANK)"


def test_one_process_for_each_gpu() -> None:
    assert int(option("--nproc-per-node")) == TRAINER["resources"]["limits"]["nvidia.com/gpu"]


def test_rendezvous_is_pod_0_of_this_jobset() -> None:
    network = MANIFEST["spec"]["network"]
    expected = f"{MANIFEST['metadata']['name']}-{REPLICATED['name']}-0-0.{network['subdomain']}"
    assert option("--master-addr") == expected
    assert network["enableDNSHostnames"], "the name would not resolve"


def test_program_and_volumes_exist() -> None:
    assert (ROOT / TRAINER["command"][0]).exists()
    assert {mount["name"] for mount in TRAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    user = re.search(r"(?m)^USER (\d+)$", (ROOT / "Dockerfile").read_text())
    assert user
    assert POD["securityContext"]["runAsUser"] == int(user[1]), "not the user of the image"


def test_data_is_only_read_and_owners_are_not_changed_file_by_file() -> None:
    (claim,) = (volume for volume in POD["volumes"] if volume["name"] == "data")
    (mount,) = (mount for mount in TRAINER["volumeMounts"] if mount["name"] == "data")
    assert claim["persistentVolumeClaim"]["readOnly"]
    assert mount["readOnly"]
    assert POD["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert {"cpu", "memory"} <= TRAINER["resources"]["requests"].keys()
    assert TRAINER["envFrom"][0]["secretRef"]["optional"], "a run without secrets could not start"
