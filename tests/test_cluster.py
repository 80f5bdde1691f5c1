"""The files of cluster/ checked without a cluster or a network.

The controls break a file by one word and must be refused; a validator that accepts anything would fail them.
"""

from __future__ import annotations

import copy
import gzip
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
CRD = Path(__file__).parents[2] / "shared" / "schemas" / "kuberay-1.7.0-rayjobs-crd.yaml.gz"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTAINERFILE = (ROOT / "cluster" / "Containerfile").read_text()
README = (ROOT / "cluster" / "README.md").read_text()
UNITS = {"Mi": 2**20, "Gi": 2**30}

Tree = dict[str, Any]


def load(name: str) -> Tree:
    return dict(yaml.safe_load((ROOT / "cluster" / name).read_text()))


def pods(job: Tree) -> dict[str, Tree]:
    """Group name -> pod spec, the head first."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]} | {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def size(quantity: str) -> int:
    """Bytes of a Kubernetes quantity such as 16Gi."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def prepared(config: Tree) -> Tree:
    """What `ray up` makes of the file before it calls AWS; raises where Ray's schema is not met."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    full: Tree = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def strict(schema: Tree) -> Tree:
    """The schema with unknown keys refused wherever it names keys (Kubernetes drops them silently)."""
    out = dict(schema)
    if out.get("x-kubernetes-int-or-string"):
        out.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if "properties" in out:
        out["properties"] = {key: strict(value) for key, value in out["properties"].items()}
        if not out.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = strict(out[key])
    return out


@pytest.fixture(scope="module")
def crd() -> jsonschema.Draft7Validator:
    if not CRD.exists():
        pytest.skip("the RayJob schema of KubeRay 1.7.0 is not beside the repository (shared/schemas)")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document = yaml.load(gzip.decompress(CRD.read_bytes()), Loader=loader)
    (version,) = [v for v in document["spec"]["versions"] if v["name"] == "v1"]
    return jsonschema.Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))


def test_aws_is_accepted_by_the_launcher() -> None:
    assert prepared(load("aws.yaml"))["docker"]["image"]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c.update(idle_timeout_minute=5),
        lambda c: c["docker"].update(imag="x"),
        lambda c: c["available_node_types"]["gpu"].update(min_worker=1),
        lambda c: c["available_node_types"]["gpu"].update(max_workers="two"),
    ],
)
def test_aws_control_one_wrong_key_is_refused(break_it: Callable[[Tree], None]) -> None:
    config = load("aws.yaml")
    break_it(config)
    with pytest.raises(jsonschema.ValidationError):
        prepared(config)


def test_aws_sets_setup_commands_so_that_no_nightly_ray_is_installed() -> None:
    full = prepared(load("aws.yaml"))
    commands = [c for key, value in full.items() if key.endswith("setup_commands") for c in value]
    assert not any("pip install" in command for command in commands)
    without = {k: v for k, v in load("aws.yaml").items() if k != "setup_commands"}
    assert any("ray-wheels/latest" in c for c in prepared(without)["head_setup_commands"]), "the trap is gone"


def test_aws_starts_nodes_with_a_token_a_named_image_and_a_role() -> None:
    config = load("aws.yaml")
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    for node in config["available_node_types"].values():
        assert {"ImageId", "InstanceType", "IamInstanceProfile"} <= node["node_config"].keys()
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


def test_rayjob_fits_the_crd(crd: jsonschema.Draft7Validator) -> None:
    assert [f"{e.json_path}: {e.message}" for e in crd.iter_errors(load("rayjob.yaml"))] == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda s: s.update(shutdownAfterJobFinish=True),
        lambda s: s["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplica=1),
        lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas="2"),
        lambda s: s["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(imag="x"),
        lambda s: s["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ],
)
def test_rayjob_control_one_wrong_key_is_refused(
    crd: jsonschema.Draft7Validator, break_it: Callable[[Tree], None]
) -> None:
    job = copy.deepcopy(load("rayjob.yaml"))
    break_it(job["spec"])
    assert not crd.is_valid(job)


def test_rayjob_obeys_the_rules_that_no_schema_holds() -> None:
    spec = load("rayjob.yaml")["spec"]
    assert bool(spec.get("shutdownAfterJobFinishes")) != ("deletionStrategy" in spec), "exactly one way to clean up"
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")
    if spec["submissionMode"] == "SidecarMode":
        assert "submitterPodTemplate" not in spec
        assert pods({"spec": spec})["head"]["restartPolicy"] == "Never"
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_rayjob_pods_have_fixed_sizes_shared_memory_and_no_written_secret() -> None:
    for name, pod in pods(load("rayjob.yaml")).items():
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        (volume,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == mount["name"]]
        memory = size(container["resources"]["limits"]["memory"])
        assert volume["medium"] == "Memory"
        assert 0.3 * memory <= size(volume["sizeLimit"]) < memory, f"{name}: Ray's object store takes 30 %"
        assert "serviceAccountName" in pod or any("secretRef" in source for source in container["envFrom"])
        assert not any("value" in variable for variable in container.get("env", []) if "AWS" in variable["name"])
        assert pod["securityContext"]["runAsNonRoot"] is True
    assert "nvidia.com/gpu" in pods(load("rayjob.yaml"))["gpu"]["containers"][0]["resources"]["limits"]


def test_rayjob_entrypoint_names_a_job_its_yaml_and_the_gpus_it_asks_for() -> None:
    spec = load("rayjob.yaml")["spec"]
    python, script, config, *overrides = shlex.split(spec["entrypoint"])
    (home,) = re.findall(r"^WORKDIR (\S+)$", CONTAINERFILE, re.M)
    inside = [Path(path).relative_to(home) for path in (script, config)]
    assert python == "python"
    assert [p.parent for p in inside] == [Path("jobs")] * 2
    assert inside[0].suffix == ".py"
    assert inside[1] == inside[0].with_suffix(".yaml")
    assert all((ROOT / path).is_file() for path in inside), f"not in the repository: {inside}"
    values = dict(override.split("=", 1) for override in overrides)
    (gpu,) = [g for g in spec["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == "gpu"]
    per_pod = int(pods({"spec": spec})["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert int(values["workers.num_workers"]) == gpu["replicas"] * per_pod
    assert values["pairs"].startswith("s3://")
    assert values["output"].startswith("s3://")


def test_ray_is_one_version_everywhere() -> None:
    (ray,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray"]
    (base, python) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py3(\d+)-gpu$", CONTAINERFILE, re.M)[0]
    assert load("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == base
    assert ray.specifier.contains(base)
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"3.{python}")


def test_image_is_one_name_everywhere() -> None:
    name = f"registry.example.com/clipdist:{PROJECT['version']}"
    assert {pod["containers"][0]["image"] for pod in pods(load("rayjob.yaml")).values()} == {name}
    assert load("aws.yaml")["docker"]["image"] == name
    for text in (README, CONTAINERFILE):
        assert set(re.findall(r"\S+/clipdist:[\w.]+", text)) == {name}


def test_containerfile_installs_what_pyproject_says_as_a_user_without_an_index() -> None:
    lines = CONTAINERFILE.replace("\\\n", " ").splitlines()
    runs = [line for line in lines if line.startswith("RUN ")]
    assert not re.search(r"https?://|index-url|find-links|--trusted-host", " ".join(runs))
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000"
    (listing,) = [shlex.split(run)[3] for run in runs if "tomllib" in run]
    printed = subprocess.run([sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == PROJECT["dependencies"]
    copied = [path for line in lines if line.startswith("COPY ") for path in line.split()[2:-1]]
    assert copied[0] == "pyproject.toml", "dependencies are a layer of their own"
    assert {"clipdist", "jobs"} <= set(copied)


def test_readme_names_files_that_exist() -> None:
    for path in set(re.findall(r"\b(?:jobs|cluster)/\w+\.\w+|\bcluster/Containerfile", README)):
        assert (ROOT / path).is_file(), path
