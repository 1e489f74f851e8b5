"""docs/deploy.md and scripts/deploy: manifests fit their schemas, commands parse and run, error lines are real ones."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import kubernetes_validate
import pytest
import yaml

from jaxmoe import LLM, RequestOutput, SamplingParams
from jaxmoe.cli.main import cli, run
from jaxmoe.parallel.mesh import parse_mesh

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "deploy.md").read_text("utf-8")
SBATCH = ROOT / "scripts" / "deploy" / "slurm.sbatch"
MANIFESTS = {path.name: path for path in sorted((ROOT / "scripts" / "deploy" / "kubernetes").glob("*.yaml"))}
# 1.29 is the first with backoffLimitPerIndex and podReplacementPolicy switched on.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
INDEX = {
    "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    "metadata.labels['apps.kubernetes.io/pod-index']",
}
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
BY_HAND = [line for line in COMMANDS if line.startswith("jaxmoe generate ")]
LAUNCH = [line for line in COMMANDS if line.startswith("jaxmoe launch ")]
SUBMITTED = [line for line in COMMANDS if "sbatch " in line]
NEED_A_CLUSTER = [
    "pip install '.[cuda]'",
    "hf download org/name",
    "python3 -m http.server 12345",
    "curl --head http://HOST-0:12345",
    "kubectl apply -f scripts/deploy/kubernetes/cache.yaml -f scripts/deploy/kubernetes/job.yaml",
    "kubectl logs --follow --selector app.kubernetes.io/instance=jaxmoe-job --prefix",
]
PROMPT = ["--dtype", "float32", "--prompt", "def mean(values):", "--max-tokens", "16", "--temperature", "0"]
MESH = ["--mesh", "data=2,tensor=2,expert=2"]

# It starts TASKS processes of one node, with the variables that Slurm sets in them.
SRUN = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
options = [arguments.pop(0) for one in sys.argv[1:] if one.startswith("--") and arguments[0] == one]
with open({record!r}, "w") as file:
    print(os.getpid(), *options, file=file)
tasks = os.environ["TASKS"]
shared = dict(os.environ, SLURM_STEP_NODELIST="localhost", SLURM_NTASKS=tasks, SLURM_NTASKS_PER_NODE=tasks)
shared["SLURM_STEP_NUM_NODES"] = "1"
each = [dict(shared, SLURM_PROCID=str(index), SLURM_LOCALID=str(index)) for index in range(int(tasks))]
children = [subprocess.Popen(arguments, env=one) for one in each]
sys.exit(max(child.wait() for child in children))
"""
# In place of jaxmoe: it prints its arguments and its devices.
SHOW = """#!{python}
import json, os, sys
found = [int(os.environ["SLURM_PROCID"]), sys.argv[1:], os.environ.get("JAX_LOCAL_DEVICE_IDS")]
os.write(1, json.dumps(found).encode() + b"\\n")
"""
JAXMOE = """#!/bin/sh
exec {python} -m jaxmoe "$@"
"""


def resources(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFESTS[name].read_text("utf-8")))


def pod_templates(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates anywhere inside a resource."""
    for key, value in resource.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict) and key in ("template", "workerTemplate") and "containers" in one.get("spec", {}):
                yield one
            elif isinstance(one, dict):
                yield from pod_templates(one)


def core_resources(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """The resources of Kubernetes itself that a resource consists of: their schemas are published."""
    named = {"metadata": {"name": "jaxmoe"}}
    if resource["kind"] == "JobSet":
        jobs = [one["template"]["spec"] for one in resource["spec"]["replicatedJobs"]]
        return [{"apiVersion": "batch/v1", "kind": "Job", **named, "spec": job} for job in jobs]
    if resource["kind"] == "LeaderWorkerSet":
        return [
            {"apiVersion": "v1", "kind": "PodTemplate", **named, "template": one} for one in pod_templates(resource)
        ]
    return [resource]


def workloads() -> Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(manifest, resource, pod spec, container) of everything that runs jaxmoe."""
    for name in MANIFESTS:
        for resource in resources(name):
            for template in pod_templates(resource):
                (container,) = template["spec"]["containers"]
                yield name, resource, template["spec"], container


WORKLOADS = {name: rest for name, *rest in workloads()}


def parsed(arguments: list[str], environment: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of a command, and the options that join processes. Raises: what the command would raise."""
    command = cli.commands[arguments[0]]
    names = [parameter.envvar for parameter in command.params if parameter.envvar]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        context = command.make_context(arguments[0], arguments[1:])
    return context.params, {key.rsplit(".", 1)[1]: value for key, value in context.meta.items() if "processes" in key}


def process_options(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What pod 1 of a manifest is started with."""
    _, _, container = WORKLOADS[name]
    controller = {"LWS_LEADER_ADDRESS": "jaxmoe-group-0.jaxmoe-group", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "1"}
    environment = {}
    for one in container["env"]:
        if "valueFrom" in one:
            assert one["valueFrom"]["fieldRef"]["fieldPath"] in INDEX
        environment[one["name"]] = one.get("value", "1")
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: controller[found[1]], one) for one in container["args"]]
    assert container["command"] == ["jaxmoe"]
    return parsed(arguments, {key: value for key, value in environment.items() if key.startswith("JAXMOE_")})


def free_port(first: int, last: int) -> int:
    for port in range(first, last):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def environment(**values: str) -> dict[str, str]:
    """The environment of processes that a test starts: the compiled programs of all tests, and no other cluster."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "JAXMOE_", "JAX_"))}
    return kept | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""} | values


def batch(
    folder: Path, jaxmoe: str, arguments: list[str], **values: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the batch script with an srun and a jaxmoe of the test's own. Also returns what srun noted."""
    record = folder / "record"
    for name, text in (("srun", SRUN), ("jaxmoe", jaxmoe)):
        (folder / name).write_text(text.format(python=sys.executable, record=str(record)), encoding="utf-8")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    child = subprocess.Popen(
        ["bash", str(SBATCH), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(PATH=path, **values),
    )  # fmt: skip
    out, err = child.communicate()
    pid, *options = record.read_text("utf-8").split()
    assert int(pid) == child.pid  # a signal to the script is one to srun
    return subprocess.CompletedProcess(child.args, child.returncode, out, err), " ".join(options)


@pytest.fixture(scope="module")
def reference() -> RequestOutput:
    """What one process with eight devices generates."""
    llm = LLM.load("demo", mesh=MESH[1], dtype="float32")
    (result,) = llm.generate(["def mean(values):"], SamplingParams(max_tokens=16, temperature=0.0))
    assert len(result.token_ids) == 16
    return result


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_fit_the_schemas(name, version):
    for resource in resources(name):
        parts = core_resources(resource)
        assert parts
        for part in parts:
            kubernetes_validate.validate(part, version, strict=True)


def test_the_schemas_refuse_a_misspelled_key():
    """The check above finds what it is there for, in a pod template of a custom resource as well."""
    (resource,) = resources("leaderworkerset.yaml")
    resource["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(core_resources(resource)[0], VERSIONS[-1], strict=True)


def test_custom_resources():
    (group,), (jobs,) = resources("leaderworkerset.yaml"), resources("gke-tpu.yaml")
    assert (group["apiVersion"], group["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    assert set(group["spec"]) == {"replicas", "startupPolicy", "leaderWorkerTemplate"}
    assert set(template) == {"size", "subGroupPolicy", "restartPolicy", "workerTemplate"}
    assert template["size"] % template["subGroupPolicy"]["subGroupSize"] == 0
    assert (jobs["apiVersion"], jobs["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobs["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    assert jobs["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert [set(one) for one in jobs["spec"]["replicatedJobs"]] == [{"name", "replicas", "template"}]


@pytest.mark.parametrize("name", WORKLOADS)
def test_commands_of_manifests_parse(name):
    params, processes = process_options(name)
    resource, _, container = WORKLOADS[name]
    spec = resource["spec"]
    if name == "gke-tpu.yaml":
        (job,) = spec["replicatedJobs"]
        pods, chips = job["template"]["spec"]["completions"], container["resources"]["limits"]["google.com/tpu"]
        assert job["template"]["spec"]["parallelism"] == pods
        selector = job["template"]["spec"]["template"]["spec"]["nodeSelector"]
        rows, columns = selector["cloud.google.com/gke-tpu-topology"].split("x")
        assert int(rows) * int(columns) == pods * chips
        assert processes["coordinator"] == "auto"
        assert processes["num_processes"] is None
    else:
        pods = {"Job": lambda: spec["completions"], "StatefulSet": lambda: spec["replicas"],
                "LeaderWorkerSet": lambda: spec["leaderWorkerTemplate"]["size"]}[resource["kind"]]()  # fmt: skip
        chips = container["resources"]["limits"]["nvidia.com/gpu"]
        instance = resource["metadata"]["name"]
        port = container["ports"][0]["containerPort"]
        assert processes["coordinator"] == f"{instance}-0.{instance}:{port}"
        assert processes["num_processes"] == pods
        assert processes["process_id"] == 1
    assert processes["lost_after"] == 30
    axes = parse_mesh(params["mesh"])
    assert axes["data"] * axes["pipeline"] * axes["expert"] * axes["tensor"] == pods * chips
    if name == "leaderworkerset.yaml":  # the stages of a data rank are in one subgroup, which is on one host
        subgroup = spec["leaderWorkerTemplate"]["subGroupPolicy"]["subGroupSize"]
        assert axes["pipeline"] > 1
        assert axes["pipeline"] * axes["expert"] * axes["tensor"] == subgroup * chips


def test_an_option_that_does_not_exist_is_found():
    with pytest.raises(click.NoSuchOption, match="--mesch"):
        parsed(["generate", "demo", "--mesch", "data=2"], {})


@pytest.mark.parametrize("name", ["job.yaml", "statefulset.yaml"])
def test_processes_find_each_other(name):
    service, workload = resources(name)
    spec, pod = workload["spec"], WORKLOADS[name][1]
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["metadata"]["name"] == (spec["serviceName"] if name == "statefulset.yaml" else pod["subdomain"])
    (rule,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert rule["labelSelector"]["matchLabels"].items() <= labels.items()
    if name == "statefulset.yaml":
        assert spec["podManagementPolicy"] == "Parallel"
    else:
        assert (spec["completionMode"], spec["completions"]) == ("Indexed", spec["parallelism"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_are_alike(name):
    resource, pod, container = WORKLOADS[name]
    (template,) = pod_templates(resource)
    (policy,) = resources("network-policy.yaml")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert container["image"] == "IMAGE"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["terminationGracePeriodSeconds"] > 30 + 5  # --lost-after and the time to end
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (claim,) = resources("cache.yaml")
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    values = {one["name"]: one.get("value") for one in container["env"]}
    cache = container["volumeMounts"][0]["mountPath"]
    assert values["XDG_CACHE_HOME"] == cache
    assert values["HF_HOME"].startswith(f"{cache}/")
    probes = [
        container[probe]["exec"]["command"] for probe in ("livenessProbe", "readinessProbe") if probe in container
    ]
    for probe in probes:
        # of this process in place of process 1
        here = [argument.replace("/1/", f"/{os.getpid()}/") for argument in probe]
        assert subprocess.run(here).returncode == 0
        assert here != probe
    stop = container["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run([*stop[:1], "-n", *stop[1:]], check=True)  # the shell reads it and runs nothing


def test_the_batch_script_is_one():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    directives = re.findall(r"^#SBATCH (.*)$", SBATCH.read_text("utf-8"), re.MULTILINE)
    assert {"--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=1", "--signal=TERM@60"} <= set(directives)


@pytest.mark.parametrize(
    ("tasks", "gpus", "devices"),
    [
        (1, 8, [None]),
        (2, 8, ["0,1,2,3", "4,5,6,7"]),
        (4, 4, ["0", "1", "2", "3"]),
        (2, 0, [None, None]),
    ],
)
def test_slurm_processes_share_the_gpus(tasks, gpus, devices, tmp_path):
    done, options = batch(tmp_path, SHOW, [], TASKS=str(tasks), SLURM_GPUS_ON_NODE=str(gpus), SLURM_JOB_ID="1")
    assert done.returncode == 0, done.stderr
    found = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert [one[2] for one in found] == devices
    assert options == "--kill-on-bad-exit=0 --wait=60"
    for _, arguments, _ in found:
        params, processes = parsed(arguments, {})
        assert processes["coordinator"] == "auto"
        assert (params["model"], params["mesh"]) == ("demo", "data=2,expert=8")


@pytest.mark.parametrize("command", SUBMITTED)
def test_slurm_commands_of_the_page(command, tmp_path):
    words = shlex.split(command)
    at = words.index("scripts/deploy/slurm.sbatch")
    values = dict(word.split("=", 1) for word in words[: words.index("sbatch")])
    done, _ = batch(tmp_path, SHOW, words[at + 1 :], TASKS="1", SLURM_JOB_ID="1", **values)
    ((_, arguments, _),) = [json.loads(line) for line in done.stdout.splitlines()]
    assert arguments[0] == ("bench" if "bench" in words else "generate")
    params, _ = parsed(arguments, {})
    assert (params["model"], params["mesh"]) == ("org/name", "data=2,expert=8")


def test_slurm_run(reference, tmp_path):
    """The batch script with two processes, which JAX finds through the variables of Slurm, and their tokens."""
    port = free_port(61440 + 100, 65535)  # the port that JAX derives from the id of the job
    arguments = ["generate", "demo", "--devices", "4", *MESH, *PROMPT, "--json"]
    done, _ = batch(tmp_path, JAXMOE, arguments, TASKS="2", SLURM_JOB_ID=str(port - 61440 + 4096))
    assert done.returncode == 0, done.stderr
    (result,) = [json.loads(line) for line in done.stdout.splitlines()]  # of process 0 only
    assert result["token_ids"] == list(reference.token_ids)


def test_commands_of_the_page_by_hand(reference):
    """The two commands of two hosts, on this one."""
    address = f"localhost:{free_port(24000, 28000)}"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *shlex.split(line.replace("HOST-0:12345", address))],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for line in BY_HAND
    ]  # fmt: skip
    first, second = (one.communicate() for one in started)
    assert [one.returncode for one in started] == [0, 0], first[1] + second[1]
    assert first[0] == f"def mean(values):{reference.text}\n"
    assert second[0] == ""


@pytest.mark.sweep
@pytest.mark.parametrize("command", LAUNCH)
def test_launch_of_the_page(command, reference):
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"def mean(values):{reference.text}\n"


def test_every_command_of_the_page_is_known():
    assert len(BY_HAND) == 2
    assert len(LAUNCH) == 1
    assert len(SUBMITTED) == 2
    assert sorted([*BY_HAND, *LAUNCH, *SUBMITTED, *NEED_A_CLUSTER]) == sorted(COMMANDS)
    for file in re.findall(r"-f (\S+)", " ".join(COMMANDS)):
        assert (ROOT / file).exists()
    assert "app.kubernetes.io/instance=jaxmoe-job" in COMMANDS[-1]
    assert WORKLOADS["job.yaml"][0]["metadata"]["name"] == "jaxmoe-job"


def messages() -> set[str]:
    """The messages in the source, with ... in place of each value. Some are the value of another one."""
    plain, formatted = set(), set()
    for file in ("address.py", "processes.py", "coordinator.py", "mesh.py"):
        for node in ast.walk(ast.parse((ROOT / "jaxmoe" / "parallel" / file).read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                formatted.add(
                    "".join(str(one.value) if isinstance(one, ast.Constant) else "..." for one in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                plain.add(node.value)
    inner = {
        outer.replace("...", one, 1) for outer in formatted if outer.startswith("... did not") for one in formatted
    }
    inner |= {outer[:-3] + one for outer in formatted if outer.endswith("lost: ...") for one in formatted}
    return {one_space(text) for text in plain | formatted | inner}


def one_space(text: str) -> str:
    """A message with one space around a value, and one ... for values that follow each other."""
    return re.sub(r"\s*(\.\.\.\s*)+", " ... ", text).strip()


def test_error_lines_of_the_page_are_those_of_the_source():
    lines = re.findall(r"^\| `([^`]+)` \|", PAGE.split("## 8. Troubleshooting")[1], re.MULTILINE)
    assert len(lines) == 14
    assert [line for line in lines if one_space(line) not in messages()] == []


def test_the_page_explains_the_exit_code(capsys):
    """An error of the table, as a user gets it."""
    with pytest.raises(SystemExit) as stopped:
        run(["generate", "--coordinator", "HOST-0"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "jaxmoe: error: coordinator 'HOST-0' must be HOST:PORT or auto\n"
