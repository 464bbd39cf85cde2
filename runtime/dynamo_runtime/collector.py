"""The cycle collector of a process that serves.

By default it walks over every object now and then, modules and their code included: a tenth of a
second in a picker, during which nobody is answered.
"""

import gc

NEW_OBJECTS = 20_000
"""Objects made, less those freed, before the youngest are looked at. Python's 700 are a few
requests' worth, most of them still under way and so found alive each time."""
YOUNGER_PASSES = (20, 100)
"""Passes over a generation before the next older one is looked at as well."""


def settle() -> None:
    """Call it once, when the process is ready: what is there then stays and is not looked at again.

    Source: CPython's documentation of ``gc.freeze``.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *YOUNGER_PASSES)
