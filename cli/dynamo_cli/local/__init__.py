"""Pods as processes: a graph's rendered Deployments, run on one Linux machine without a cluster.

``plan`` turns manifests into data, ``runner`` turns that data into processes; everything between
them is one Kubernetes rule per file.
"""
