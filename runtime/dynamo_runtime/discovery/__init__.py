"""Which engines there are: the seam between a picker and whatever knows the pods.

In a cluster that is a watch on the API server, on one machine a file that the local runner writes.
Both yield whole snapshots: a picker compares with what it had, and never has to replay a diff.
"""

from dynamo_runtime.discovery.file import FileEndpointSource as FileEndpointSource
from dynamo_runtime.discovery.file import InvalidEndpoints as InvalidEndpoints
from dynamo_runtime.discovery.file import read_endpoints as read_endpoints
from dynamo_runtime.discovery.file import write_endpoints as write_endpoints
from dynamo_runtime.discovery.inference_pool import InferencePoolSource as InferencePoolSource
from dynamo_runtime.discovery.inference_pool import InvalidPool as InvalidPool
from dynamo_runtime.discovery.inference_pool import PoolSpec as PoolSpec
from dynamo_runtime.discovery.inference_pool import selected_pods as selected_pods
from dynamo_runtime.discovery.inference_pool import target_ports as target_ports
from dynamo_runtime.discovery.kubernetes import KubernetesEndpointSource as KubernetesEndpointSource
from dynamo_runtime.discovery.source import EndpointSource as EndpointSource
from dynamo_runtime.endpoint import ROLES as ROLES
from dynamo_runtime.endpoint import Endpoint as Endpoint
