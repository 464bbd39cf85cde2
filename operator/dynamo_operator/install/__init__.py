"""Installing: the CRDs with respect for those of others, and the manifests of operator and webhook.

`manifests` and what it uses (`rights`, `workloads`, `hooks`) are pure: settings in, manifests out.
"""
