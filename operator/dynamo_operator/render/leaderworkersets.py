"""LeaderWorkerSets: engines that span several nodes, one group of pods for each replica.

A group lives and dies as a whole: ranks of one engine cannot be replaced one by one. Its object is
that of kubernetes-sigs/lws (leaderworkerset.x-k8s.io/v1).
"""

from collections.abc import Mapping

from dynamo_operator.render import deployments
from dynamo_operator.render.merge import Json
from dynamo_operator.render.overrides import Scale
from dynamo_operator.render.parts import Graph, Part


def leader_worker_set(
    part: Part, graph: Graph, generation: str, templates: Mapping[str, Json], scale: Scale
) -> Json:
    """The component's groups, of `templates` "leader" and "worker"."""
    strategy: Json = {"type": "RollingUpdate"}
    if rolling := deployments.bounds(part, graph):
        strategy["rollingUpdateConfiguration"] = rolling
    spec: Json = {
        "leaderWorkerTemplate": {
            "size": part.nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": templates["leader"],
            "workerTemplate": templates["worker"],
        },
        "rolloutStrategy": strategy,
        "startupPolicy": "LeaderCreated",
    }
    if scale.replicas is not None:
        spec["replicas"] = scale.replicas
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": deployments.workload_metadata(part, graph, generation, scale),
        "spec": spec,
    }
