"""Manifests to test with: small ones of our own, and the corpora that CORPORA names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

V1BETA1 = """\
apiVersion: nvidia.com/v1beta1
kind: DynamoGraphDeployment
metadata:
  name: chat
spec:
  backendFramework: vllm
  env:
  - name: HF_HOME
    value: /cache
  components:
  - name: Frontend
    type: frontend
    replicas: 1
    podTemplate:
      spec:
        containers:
        - name: main
          image: dynamo-platform/frontend:1
        - name: logger
          image: logger:1
  - name: decode
    type: decode
    replicas: 2
    minAvailable: 1
    scalingAdapter: {}
    multinode: {nodeCount: 2}
    sharedMemorySize: 16Gi
    podTemplate:
      metadata:
        labels: {team: search}
      spec:
        containers:
        - name: main
          image: dynamo-platform/vllm:1
          args: [--model, tiny]
          resources:
            limits: {nvidia.com/gpu: "1", memory: 8Gi}
"""

V1ALPHA1 = """\
apiVersion: nvidia.com/v1alpha1
kind: DynamoGraphDeployment
metadata:
  name: chat
spec:
  pvcs:
  - name: models
    create: true
    size: 100Gi
    storageClass: fast
    volumeAccessMode: ReadWriteMany
  envs:
  - name: HF_HOME
    value: /cache
  services:
    Frontend:
      componentType: frontend
      replicas: 1
      ingress: {enabled: true, host: chat.example.org}
      extraPodSpec:
        mainContainer:
          image: dynamo-platform/frontend:1
    Decode:
      componentType: worker
      subComponentType: decode
      replicas: 2
      envFromSecret: hf-token
      envs:
      - name: LEVEL
        value: info
      resources:
        requests: {cpu: "4"}
        limits: {gpu: "1", memory: 8Gi, custom: {rdma/ib: "1"}}
      volumeMounts:
      - name: models
        mountPoint: /models
      - name: kernels
        mountPoint: /root/.cache/vllm
        useAsCompilationCache: true
      sharedMemory: {size: 16Gi}
      livenessProbe:
        httpGet: {path: /live, port: 9090}
      extraPodSpec:
        tolerations:
        - operator: Exists
        containers:
        mainContainer:
          image: dynamo-platform/vllm:1
          args: [--model, tiny]
"""

ADAPTER = """\
apiVersion: nvidia.com/v1beta1
kind: DynamoGraphDeploymentScalingAdapter
metadata:
  name: chat-decode
spec:
  replicas: 2
  dgdRef: {name: chat, componentName: decode}
"""


@pytest.fixture(scope="session")
def corpora() -> Path:
    folder = os.environ.get("CORPORA")
    if not folder:
        pytest.skip("CORPORA names no folder of real manifests")
    return Path(folder)


@pytest.fixture
def v1beta1_text() -> str:
    return V1BETA1


@pytest.fixture
def v1alpha1_text() -> str:
    return V1ALPHA1


@pytest.fixture
def adapter_text() -> str:
    return ADAPTER
