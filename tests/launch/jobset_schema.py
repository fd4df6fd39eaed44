"""The part of JobSet's API that our manifest uses: names and types of fields, as published.

Sources: jobset.x-k8s.io/v1alpha2 in `api/jobset/v1alpha2/jobset_types.go` of kubernetes-sigs/jobset (JobSetSpec, Network,
Coordinator, FailurePolicy, FailurePolicyRule, ReplicatedJob); batch/v1 JobSpec and PodFailurePolicy; core/v1 PodSpec and
Container.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Schema = Any  # a type, a Mapping of fields, a list with the schema of its items, a Text, a Number or an OneOf


@dataclass(frozen=True)
class OneOf:
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Text:
    """A string that matches the pattern as a whole."""

    pattern: str


@dataclass(frozen=True)
class Number:
    least: int
    most: int = 2**31 - 1


@dataclass(frozen=True)
class MapOf:
    """Any keys that match the pattern, with values of one schema."""

    keys: str
    values: Schema


LABEL = Text(r"([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)")  # RFC 1123, for names of Kubernetes
QUALIFIED = r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
STRINGS = MapOf(QUALIFIED, str)
JOB_FAILURE_REASON = OneOf(
    ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
)
ACTION = OneOf(
    ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts")
)

POD = {
    "restartPolicy": OneOf(("Never",)),  # batch/v1: the only one that a podFailurePolicy allows
    "serviceAccountName": Text(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?"),
    "automountServiceAccountToken": bool,
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": Number(0),
        "runAsGroup": Number(0),
        "seccompProfile": {"type": OneOf(("RuntimeDefault", "Unconfined", "Localhost"))},
    },
    "terminationGracePeriodSeconds": Number(0),
    "nodeSelector": STRINGS,
    "containers": [
        {
            "name": LABEL,
            "image": str,
            "command": [str],
            "args": [str],
            "securityContext": {
                "privileged": bool,
                "allowPrivilegeEscalation": bool,
                "capabilities": {"drop": [str], "add": [str]},
            },
            "env": [{"name": Text(r"[A-Za-z_][A-Za-z0-9_]*"), "value": str}],
            "ports": [{"containerPort": Number(1, 65535)}],
            "resources": {"requests": MapOf(QUALIFIED, Number(1)), "limits": MapOf(QUALIFIED, Number(1))},
            "volumeMounts": [{"name": LABEL, "mountPath": Text(r"/[^:]*")}],
        }
    ],
    "volumes": [
        {"name": LABEL, "csi": {"driver": str, "volumeAttributes": STRINGS}, "emptyDir": {"medium": OneOf(("", "Memory"))}}
    ],
}
JOB = {
    "parallelism": Number(0),
    "completions": Number(0),
    "completionMode": OneOf(("NonIndexed", "Indexed")),
    "backoffLimit": Number(0),
    "podFailurePolicy": {
        "rules": [
            {
                "action": OneOf(("FailJob", "FailIndex", "Ignore", "Count")),
                "onPodConditions": [{"type": str, "status": OneOf(("True", "False", "Unknown"))}],
                "onExitCodes": {"containerName": LABEL, "operator": OneOf(("In", "NotIn")), "values": [Number(0, 255)]},
            }
        ]
    },
    "template": {"metadata": {"annotations": STRINGS}, "spec": POD},
}
JOBSET = {
    "apiVersion": OneOf(("jobset.x-k8s.io/v1alpha2",)),
    "kind": OneOf(("JobSet",)),
    "metadata": {"name": LABEL, "labels": STRINGS, "annotations": STRINGS},
    "spec": {
        "ttlSecondsAfterFinished": Number(0),
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": LABEL},
        "coordinator": {"replicatedJob": str, "jobIndex": Number(0), "podIndex": Number(0)},
        "failurePolicy": {
            "maxRestarts": Number(0),
            "rules": [
                {
                    "name": Text(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                    "action": ACTION,
                    "onJobFailureReasons": [JOB_FAILURE_REASON],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "replicatedJobs": [{"name": LABEL, "replicas": Number(0), "template": {"spec": JOB}}],
    },
}


def filled_in(argument: str, **variables: str) -> str:
    """What Kubernetes makes of a word of `command` or `args`: `$$` is one dollar sign, a variable of the container its value.

    Source: third_party/forked/golang/expansion of kubernetes/kubernetes. A variable that is not there stays as it is written.
    """
    variables = {"PYTHONUNBUFFERED": "1"} | variables
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]),
        argument,
    )


def problems(value: Any, schema: Schema, place: str = "") -> list[str]:
    """Where `value` is not of the schema, one line each; empty where it is."""
    match schema:
        case OneOf(values):
            return [] if value in values else [f"{place}: {value!r} is none of {values}"]
        case Text(pattern):
            return [] if isinstance(value, str) and re.fullmatch(pattern, value) else [f"{place}: {value!r} is not {pattern}"]
        case Number(least, most):
            fits = type(value) is int and least <= value <= most
            return [] if fits else [f"{place}: {value!r} is not a whole number from {least} to {most}"]
        case type():
            return [] if type(value) is schema else [f"{place}: {value!r} is not a {schema.__name__}"]
        case [item]:
            if type(value) is not list:
                return [f"{place}: {value!r} is not a list"]
            return [line for index, entry in enumerate(value) for line in problems(entry, item, f"{place}[{index}]")]
    if type(value) is not dict:
        return [f"{place}: {value!r} is not a mapping"]
    if isinstance(schema, MapOf):
        wrong = [f"{place}.{key}: no such key is allowed" for key in value if not re.fullmatch(schema.keys, key)]
        return wrong + [line for key, entry in value.items() for line in problems(entry, schema.values, f"{place}.{key}")]
    assert isinstance(schema, Mapping)
    unknown = [f"{place}.{key}: unknown field" for key in value if key not in schema]
    known = [(key, entry) for key, entry in value.items() if key in schema]
    return unknown + [line for key, entry in known for line in problems(entry, schema[key], f"{place}.{key}")]
