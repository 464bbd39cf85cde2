"""Between a request and the choice: who may go now, who waits, who is refused, and why.

Pure are `queue` (bands, tenants, bounds), `saturation`, `limits`, `identity`, `pace` and `demand`;
`gate` is the asyncio around them.
"""
