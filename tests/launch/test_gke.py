"""The JobSet that gke.sh makes: JobSet's published API field by field, and GKE's documented TPU selectors."""

import json

import pytest
import yaml

from tests.launch.jobset_schema import JOBSET, filled_in, problems
from tests.launch.scripts import LAUNCH, TRAIN, Tools, run

# GKE, "Plan TPUs": the label of every generation, and nodes of a slice whose machines have four chips each
# (ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t).
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
FLAT = {"2x2": 1, "2x4": 2, "4x4": 4, "4x8": 8, "8x8": 16, "8x16": 32, "16x16": 64}
CUBES = {"2x2x1": 1, "2x2x2": 2, "2x2x4": 4, "2x4x4": 8, "4x4x4": 16, "4x4x8": 32, "4x8x8": 64, "8x8x8": 128, "8x8x12": 192}
SLICES = [(generation, *slice_) for generation in ("v5e", "v6e") for slice_ in FLAT.items()]
SLICES += [("v5p", *slice_) for slice_ in CUBES.items()]


def rendered(*arguments, topology="v5p:4x4x4", train=TRAIN):
    options = ("--name=stage2-7b", f"--topology={topology}", "--image=r/i:t", "--bucket=my-bucket")
    done = run("gke.sh", "render", *options, *arguments, "--", *train)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def job_of(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(manifest):
    return job_of(manifest)["template"]["spec"]


@pytest.fixture(scope="module")
def manifest():
    return rendered("--slices=2", "--queue=my-queue")


def test_nothing_but_published_fields_with_their_types(manifest):
    assert problems(manifest, JOBSET) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules"), [{"name": "a", "action": "Restart"}]),
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "arguments"), ["a"]),
        (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCodes"), {"values": [300]}),
    ],
)
def test_the_schema_finds_mistakes(path, value):
    manifest = rendered()
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert len(problems(manifest, JOBSET)) == 1


def test_the_template_is_valid_yaml_as_it_stands():
    template = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert template["metadata"]["name"] == "${NAME}"
    assert job_of(template)["parallelism"] == job_of(template)["completions"] == "${HOSTS}"


@pytest.mark.parametrize(("generation", "topology", "hosts"), SLICES)
def test_selectors_hosts_and_chips_of_every_slice(generation, topology, hosts):
    manifest = rendered(topology=f"{generation}:{topology}")
    job, pod = job_of(manifest), pod_of(manifest)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[generation],
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert job["parallelism"] == job["completions"] == hosts
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}


def test_one_job_per_slice_and_one_pod_per_host(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    assert job_of(manifest)["completionMode"] == "Indexed"
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_preemption_restarts_without_end_and_failure_a_few_times(manifest):
    """The way of an exit code: podFailurePolicy fails the Job with reason PodFailurePolicy, whose rule restarts the JobSet."""
    job = job_of(manifest)
    assert job["backoffLimit"] == 0
    conditions, exit_codes = job["podFailurePolicy"]["rules"]
    assert conditions == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert exit_codes == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [75]}}
    assert [container["name"] for container in pod_of(manifest)["containers"]] == ["train"]
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 10
    preempted, failed = policy["rules"]
    assert preempted["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert preempted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert (failed["action"], set(failed)) == ("RestartJobSet", {"name", "action"})


def test_the_coordinator_has_a_name_in_the_headless_service_of_the_jobset(manifest):
    spec = manifest["spec"]
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": "stage2-7b"}
    coordinator = spec["coordinator"]
    assert coordinator == {"replicatedJob": spec["replicatedJobs"][0]["name"], "jobIndex": 0, "podIndex": 0}
    assert 8482 in [port["containerPort"] for port in pod_of(manifest)["containers"][0]["ports"]]  # jax's cloud_tpu_cluster.py


def test_longest_name_leaves_room_for_the_pods_own():
    manifest = rendered("--name=" + "a" * 40, "--slices=64", topology="v5p:16x16x24")
    replicated, hosts = manifest["spec"]["replicatedJobs"][0], job_of(manifest)["completions"]
    pod = f"{manifest['metadata']['name']}-{replicated['name']}-{replicated['replicas'] - 1}-{hosts - 1}-abcde"
    assert len(pod) <= 63


def test_cache_data_and_shared_memory_are_mounted(manifest):
    pod = pod_of(manifest)
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    mounts = {entry["name"]: entry["mountPath"] for entry in container["volumeMounts"]}
    volumes = {entry.pop("name"): entry for entry in pod["volumes"]}
    assert mounts == {"bucket": "/gcs", "shared-memory": "/dev/shm"}
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith("/gcs/")
    assert volumes["shared-memory"] == {"emptyDir": {"medium": "Memory"}}
    bucket = volumes["bucket"]["csi"]
    assert (bucket["driver"], bucket["volumeAttributes"]["bucketName"]) == ("gcsfuse.csi.storage.gke.io", "my-bucket")
    assert job_of(manifest)["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_options_and_queue_land_in_their_fields():
    options = ("--queue=q", "--max-restarts=3", "--grace-seconds=45", "--service-account=trainer", "--name=true")
    manifest = rendered(*options)
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert manifest["metadata"]["name"] == "true"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert (pod_of(manifest)["terminationGracePeriodSeconds"], pod_of(manifest)["serviceAccountName"]) == (45, "trainer")
    assert list(rendered()["metadata"]["labels"]) == ["app.kubernetes.io/name"]


def test_train_gets_its_arguments_as_they_were_given():
    tricky = [
        *TRAIN,
        '--config.name=a "b" \\ c: d # e',
        "--config.x=${NAME} {[,]}",
        "--config.y=é*'",
        "--config.z=$(PYTHONUNBUFFERED) $$ $",
    ]
    container = pod_of(rendered(train=tricky))["containers"][0]
    assert container["command"] == ["python", "-m", "deepstack_jax.train"]
    assert [filled_in(argument) for argument in container["args"]] == tricky


def test_the_pods_have_no_rights_that_training_does_not_need():
    """As the level "restricted" of Kubernetes' Pod Security Standards wants it, and no token of the cluster's."""
    pod = pod_of(rendered())
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], "add": []},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(pod)
    # The image's own user, to whom the bucket belongs.
    assert "\nUSER 1000:1000\n" in (LAUNCH / "Dockerfile").read_text()
    bucket = next(volume for volume in pod["volumes"] if volume["name"] == "bucket")
    assert bucket["csi"]["volumeAttributes"]["mountOptions"] == "implicit-dirs,uid=1000,gid=1000"


def test_root_where_the_cluster_hands_its_chips_to_no_other_user():
    pod = pod_of(rendered("--user=0"))
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (False, 0)
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["SYS_RESOURCE"]}
    bucket = next(volume for volume in pod["volumes"] if volume["name"] == "bucket")
    assert bucket["csi"]["volumeAttributes"]["mountOptions"] == "implicit-dirs,uid=0,gid=0"


def test_create_hands_the_manifest_to_kubectl(tmp_path):
    tools = Tools(tmp_path)
    tools.add("kubectl", f"cat > {tmp_path}/manifest")
    options = ("--name=a", "--topology=v6e:4x4", "--image=i", "--bucket=bb", "--namespace=team")
    done = run("gke.sh", "create", *options, "--", *TRAIN, tools=tools)
    assert done.returncode == 0, done.stderr
    assert tools.calls() == ["kubectl --namespace=team create --filename=-"]
    assert problems(yaml.safe_load((tmp_path / "manifest").read_text()), JOBSET) == []


@pytest.mark.parametrize(
    ("verb", "calls"),
    [
        ("status", ["get jobset a --output=wide", "get pods --selector=jobset.sigs.k8s.io/jobset-name=a --output=wide"]),
        ("stop", ['patch jobset a --type=merge --patch={"spec":{"suspend":true}}']),
        ("resume", ['patch jobset a --type=merge --patch={"spec":{"suspend":false}}']),
        ("delete", ["delete jobset a"]),
    ],
)
def test_the_other_verbs_are_one_kubectl_call_each(verb, calls, tmp_path):
    tools = Tools(tmp_path)
    tools.add("kubectl")
    assert run("gke.sh", verb, "--name=a", tools=tools).returncode == 0
    assert tools.calls() == [f"kubectl --namespace=default {call}" for call in calls]


def test_logs_are_those_of_the_first_host(tmp_path):
    tools = Tools(tmp_path)
    tools.add("kubectl")
    assert run("gke.sh", "logs", "--name=a", tools=tools).returncode == 0
    (call,) = tools.calls()
    assert "logs --follow --container=train" in call
    assert call.endswith("jobset-name=a,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0")


def test_json_of_a_patch_is_json():
    done = run("gke.sh", "stop", "--name=a", "--dry-run")
    assert json.loads(done.stdout.split("--patch=")[1].rstrip().rstrip("'")) == {"spec": {"suspend": True}}
