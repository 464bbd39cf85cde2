"""What the status of some graphs has to say, as a person read it off their files.

Rendering can't vouch for itself: which conditions are True, and about what, was judged from the
manifests and Dynamo's documentation; only some of the words are those of this platform's notes. The
labels are compared with those notes (`tests/operator/test_corpora.py`) and with the conditions of a
real cluster (`test_compatibility.py`). They hold for default settings (images of NVIDIA's registry
are replaced, others are not), whichever optional kinds a cluster serves.
"""

from __future__ import annotations

from collections.abc import Mapping

CONDITIONS = ("RuntimeUnsupported", "NotRendered", "Adapted")

LABELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    # Frontend and simulated engine, both in NVIDIA's planner image.
    "examples__backends__mocker__deploy__agg.yaml": {
        "Adapted": ("Frontend", "dynamo frontend", "decode", "dynamo worker sim"),
    },
    # SGLang, whose image lies in a registry of the user's; so does the frontend's.
    "examples__backends__sglang__deploy__agg.yaml": {
        "RuntimeUnsupported": ("Frontend", "my-registry", "decode", "dynamo.sglang"),
    },
    # TensorRT-LLM that wants to wait for a snapshot of itself.
    "examples__backends__trtllm__deploy__snapshot-restore.yaml": {
        "RuntimeUnsupported": ("Frontend", "TRTLLMWorker", "dynamo.trtllm"),
        "NotRendered": ("TRTLLMWorker", "checkpoint"),
    },
    # vLLM whose weights another process holds on the GPU: both the field and the loader's flag.
    "examples__backends__vllm__deploy__agg_gms.yaml": {
        "NotRendered": ("VllmWorker", "gpuMemoryService"),
        "Adapted": ("dynamo frontend", "dynamo worker vllm", "--load-format gms"),
    },
    # vLLM with a connector that only NVIDIA's image holds.
    "examples__backends__vllm__deploy__agg_kvbm.yaml": {
        "Adapted": ("dynamo worker vllm", "VllmDecodeWorker", "KV block manager"),
    },
    # Intel's GPUs: the worker's image is another one than the frontend's.
    "examples__backends__vllm__deploy__xpu__agg_router_xpu_dra.yaml": {
        "Adapted": ("VllmDecodeWorker", "vllm-runtime-xpu:my-tag", "vllm-xpu", "special build"),
    },
    # Amazon's network: the build stands in the tag; commands are scripts.
    "examples__deployments__EKS__manifests__vllm__disagg.yaml": {
        "Adapted": ("VllmDecodeWorker", "VllmPrefillWorker", "1.3.0-efa", "special build"),
    },
    # Nothing but vLLM, in a registry of the user's.
    "examples__deployments__GKE__vllm__disagg.yaml": {
        "RuntimeUnsupported": ("Frontend", "VllmDecodeWorker", "VllmPrefillWorker", "my-registry"),
    },
    # Dynamo's runtime beside an unmodified engine, in a program of its own.
    "lib__sidecar__vllm__deploy__agg.yaml": {
        "RuntimeUnsupported": ("VLLMWorker", "dynamo-vllm-sidecar"),
        "Adapted": ("Frontend", "dynamo frontend"),
    },
    # Plain vLLM on GPUs, eight times, in the old version; its cache of kernels is a volume.
    "recipes__qwen3-32b__vllm__agg-round-robin__deploy.yaml": {
        "Adapted": ("Frontend", "dynamo frontend", "VllmDecodeWorker", "dynamo worker vllm"),
    },
    # A server of its own, started from a file of its own.
    "examples__diffusers__deploy__agg.yaml": {
        "RuntimeUnsupported": ("FastVideoWorker", "worker.py", "Frontend"),
    },
    # A form to fill in.
    "deploy__operator__config__samples__nvidia.com_v1alpha1_dynamographdeployment.yaml": {},
}
"""File of the corpora, one graph each → the conditions that are True, and what each has to name."""


def mislabelled(file: str, told: Mapping[str, str]) -> str:
    """What contradicts the label of `file`, "" if nothing does.

    `told` has the messages of the conditions that are True, by type.
    """
    wanted = LABELS[file]
    for type in CONDITIONS:
        if (type in told) != (type in wanted):
            return f"{type}: {told.get(type, 'not said')}, expected {wanted.get(type, 'none')}"
        for words in wanted.get(type, ()):
            if words not in told[type]:
                return f"{type}: {words!r} is not in {told[type]!r}"
    return ""
