"""The worker event stream: what a worker says about its cache and its load, to every picker.

Workers are the truth about themselves, so the stream goes straight from each worker to each
picker, with no broker between. `format` is what goes over the wire, `session` is the protocol
without I/O, `publisher` and `subscriber` move its frames over ZeroMQ.
"""
