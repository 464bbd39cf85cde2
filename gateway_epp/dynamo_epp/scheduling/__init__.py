"""From workers to a decision: filters drop, scorers score, pickers order. All of it pure.

`README.md` says which plugins there are and by which rules they are put together.
"""
