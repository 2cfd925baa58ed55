"""The KubeRay manifests against the operator's schemas, made strict: a field that it does not know fails."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
CRDS = Path(os.environ.get("RLHF_CLUSTER_CRDS", ROOT.parent / "shared" / "crds"))
ROLES = {"generation", "reward", "reference", "learner"}


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.fixture(scope="session")
def schemas() -> dict[str, Any]:
    """Strict JSON schemas by `kind apiVersion`."""
    files = sorted(CRDS.glob("ray.io_*.yaml"))
    if not files:
        pytest.skip(
            f"no KubeRay CRDs in {CRDS}; set RLHF_CLUSTER_CRDS to a folder with ray.io_rayclusters.yaml and so on"
        )
    found = {}
    for path in files:
        crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for version in crd["spec"]["versions"]:
            name = f"{crd['spec']['names']['kind']} {crd['spec']['group']}/{version['name']}"
            found[name] = strict(version["schema"]["openAPIV3Schema"])
    return found


def strict(schema: Any) -> Any:
    """Kubernetes drops unknown fields in silence; here they are refused. `int-or-string` is not JSON Schema's."""
    if not isinstance(schema, dict):
        return schema
    schema = {
        key: value for key, value in schema.items() if not key.startswith("x-") or key == "x-kubernetes-int-or-string"
    }
    if schema.pop("x-kubernetes-int-or-string", False):
        return {**{k: v for k, v in schema.items() if k not in ("type", "anyOf")}, "type": ["integer", "string"]}
    if "properties" in schema:
        properties = {key: strict(value) for key, value in schema["properties"].items()}
        return {**schema, "properties": properties, "additionalProperties": False}
    for key in ("items", "additionalProperties"):
        if key in schema:
            schema[key] = strict(schema[key])
    return schema


def check(manifest: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    schema = schemas[f"{manifest['kind']} {manifest['apiVersion']}"]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in errors]


def test_there_are_manifests() -> None:
    assert {path.name for path in MANIFESTS} >= {"raycluster.yaml", "rayjob.yaml"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_manifest_is_what_the_operator_knows(path: Path, schemas: dict[str, Any]) -> None:
    assert check(read(path), schemas) == []


def test_a_typo_a_wrong_type_and_a_missing_field_are_caught(schemas: dict[str, Any]) -> None:
    good = read(ROOT / "deploy" / "kuberay" / "raycluster.yaml")
    for change, expected in (
        (lambda spec: spec.update(headGroupSpecs={}), "headGroupSpecs"),
        (lambda spec: spec["workerGroupSpecs"][0].update(replicas="four"), "'four' is not of type 'integer'"),
        (lambda spec: spec["workerGroupSpecs"][0].pop("maxReplicas"), "'maxReplicas' is a required property"),
        (lambda spec: spec["authOptions"].update(mode="tokens"), "'tokens' is not one of"),
        (
            lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(imagePolicy=""),
            "imagePolicy",
        ),
    ):
        bad = copy.deepcopy(good)
        change(bad["spec"])
        (error,) = check(bad, schemas)
        assert expected in error


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_authentication_is_written_out(path: Path) -> None:
    """The operator has no default for the mode, and only `token` switches it on."""
    options = cluster_spec(read(path))["authOptions"]
    assert options["mode"] == "token"
    assert options["secretName"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_role_has_a_group_of_its_own(path: Path) -> None:
    spec = cluster_spec(read(path))
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == ROLES
    assert spec["enableInTreeAutoscaling"] is False
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["labels"] == {"role": name}
        # KubeRay wants JSON in a shell's quotes.
        assert json.loads(shlex.split(group["rayStartParams"]["resources"])[0].replace("\\", "")) == {name: 1}
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_job_runs_on_the_cluster_that_stays() -> None:
    """One description of the cluster: the two files differ in their frame alone."""
    cluster, job = (read(ROOT / "deploy" / "kuberay" / name) for name in ("raycluster.yaml", "rayjob.yaml"))
    assert cluster_spec(cluster) == cluster_spec(job)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_versions_are_those_of_pyproject(path: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (ray_version,) = re.findall(r'"ray\[[\w,]+\]==([\d.]+)"', project)
    (version,) = re.findall(r'^version = "([\d.]+)"', project, re.MULTILINE)
    manifest = read(path)
    assert cluster_spec(manifest)["rayVersion"] == ray_version
    assert manifest["metadata"]["labels"]["app.kubernetes.io/version"] == version
    images = set(re.findall(r"image: (?:&\w+ )?(rlhf-cluster\S+)", path.read_text()))
    assert images == {f"rlhf-cluster:{version}-cuda"}
