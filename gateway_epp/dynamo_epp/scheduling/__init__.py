"""From workers to a decision: filters drop, the cost function ranks. All of it pure.

`filters` holds the reasons for which a worker can't be chosen, `candidates` turns the workers that
are left into what `dynamo_kv_router.choice` ranks.
"""
