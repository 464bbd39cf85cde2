"""Admission: what the API server asks before it stores a graph, and in which version it shows one.

What is allowed is decided in `policy` and what it uses (`changes`, `advice`, `trial`): pure, from a
request to a verdict. `conversion` answers in the other version. `certificates` says what a
certificate is worth and when it is due. The rest moves bytes: `dry_run` asks the API server about
rendered objects, `keeper` holds certificates, `bundle` makes the API server trust them, `server`
listens, `webhook` is the process.
"""
