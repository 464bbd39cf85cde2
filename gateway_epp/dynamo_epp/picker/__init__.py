"""The picker: a request in, a ranked list of endpoints out, and what becomes of it afterwards.

`README.md` says which module does what, in the order in which a request meets them.
"""

from dynamo_epp.picker.pick import KvPicker

__all__ = ["KvPicker"]
