"""Diagnosis: what is wrong with pods, in words that say what to do.

Two readers: the status, which tells people, and the rollout, which goes back when it is the new
pods' own fault.
"""
