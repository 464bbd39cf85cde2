"""The planner: how many replicas of each worker a graph needs, and why."""
