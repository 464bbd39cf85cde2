"""Why a request went where it went: what is kept of decisions, and how it is told.

`README.md` says what goes in and what comes out.
"""

from dynamo_epp.explain.compact import Kept
from dynamo_epp.explain.entries import Disagg, Entry, Refused
from dynamo_epp.explain.journal import Journal

__all__ = ["Disagg", "Entry", "Journal", "Kept", "Refused"]
