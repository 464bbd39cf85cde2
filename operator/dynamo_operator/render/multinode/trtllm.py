"""TensorRT-LLM over several nodes: the leader starts all ranks with `mpirun` over SSH.

The other nodes run nothing but an SSH server. Leader and workers share a key pair that has to lie
in a Secret of the graph's namespace.
"""

from collections.abc import Mapping
from typing import Any

from dynamo_operator.render import notes, shell
from dynamo_operator.render.environment import variable
from dynamo_operator.render.merge import Json, entries, mapping
from dynamo_operator.render.multinode.commandline import CommandLine
from dynamo_operator.render.multinode.node import ALIASES, LEADER_IN_SHELL, Nodes
from dynamo_operator.render.notes import Notes

SSH_PORT = 2222
SECRET = "mpi-run-ssh-secret"
"""Name of the Secret with `private.key` and `private.key.pub`, as in Dynamo."""
_KEYS = "/ssh-pk"
_NAMES_STAY_WHOLE = variable("OMPI_MCA_orte_keep_fqdn_hostnames", "1")
_PASSED_ON = (
    "CUDA_VISIBLE_DEVICES HF_ENDPOINT HF_HOME HF_TOKEN HOME LD_LIBRARY_PATH MODEL_PATH NCCL_DEBUG"
    " NCCL_IB_DISABLE NCCL_P2P_DISABLE PATH PYTHONPATH TOKENIZERS_PARALLELISM"
    " TRTLLM_USE_UCX_KVCACHE USER"
)
"""Variables that every rank gets beside those of the container."""

_OWN = {entry["name"] for entry in ALIASES}

_SSH = f"""\
set -e
mkdir -p $HOME/.ssh
cp {_KEYS}/private.key $HOME/.ssh/id_rsa
cp {_KEYS}/private.key.pub $HOME/.ssh/authorized_keys
chmod 600 $HOME/.ssh/id_rsa $HOME/.ssh/authorized_keys
"""
_SERVE = f"""\
{_SSH}ssh-keygen -q -t ed25519 -N '' -f $HOME/.ssh/host_key
exec /usr/sbin/sshd -D -e -p {SSH_PORT} -h $HOME/.ssh/host_key -o StrictModes=no \
-o PidFile=none -o PermitRootLogin=yes -o PasswordAuthentication=no \
-o AuthorizedKeysFile=$HOME/.ssh/authorized_keys
"""


def nodes(
    component: str,
    main: Mapping[str, Any],
    line: CommandLine,
    count: int,
    gpus: int,
    noted: Notes,
) -> Nodes:
    """`count` nodes with `gpus` GPUs each."""
    message = f"needs the Secret {SECRET} with an SSH key pair (private.key, private.key.pub)"
    noted.add(component, notes.MULTINODE_NEEDS_SECRET, message)
    env = [*entries(main.get("env")), _NAMES_STAY_WHOLE]
    mount = {"name": SECRET, "mountPath": _KEYS, "readOnly": True}
    main = {**main, "env": env, "volumeMounts": [*entries(main.get("volumeMounts")), mount]}
    # What tells one pod from another stays with it.
    written = {
        str(entry.get("name")) for entry in env if "fieldRef" not in mapping(entry.get("valueFrom"))
    } - _OWN
    passed = " ".join(f"-x {name}" for name in sorted(written | set(_PASSED_ON.split())))
    ranks = count * max(1, gpus)
    workers = [f"$(printf %s {LEADER_IN_SHELL} | sed 's/\\./-{i}./')" for i in range(1, count)]
    hosts = " ".join(workers)
    run = shell.quoted(f"{line.before or ''}trtllm-llmapi-launch {line.text}").raw
    script = f"""\
{_SSH}for host in {hosts}; do until getent hosts $host; do sleep 2; done; done
exec mpirun $(test $(id -u) = 0 && echo --allow-run-as-root) --oversubscribe -n {ranks} \
-H {",".join([LEADER_IN_SHELL, *workers])} --mca pml ob1 --mca plm_rsh_args \
"-p {SSH_PORT} -o StrictHostKeyChecking=no -i $HOME/.ssh/id_rsa" {passed} bash -c {run}
"""
    return Nodes(
        _shell(main, script),
        _shell(main, _SERVE),
        worker_ready=_listens(),
        volumes=[{"name": SECRET, "secret": {"secretName": SECRET, "defaultMode": 0o644}}],
    )


def _shell(main: Mapping[str, Any], script: str) -> Json:
    return {**main, "command": ["/bin/sh", "-c"], "args": [script]}


def _listens() -> Json:
    return {
        "tcpSocket": {"port": SSH_PORT},
        "initialDelaySeconds": 20,
        "periodSeconds": 20,
        "timeoutSeconds": 5,
        "failureThreshold": 10,
    }
