"""Who of the scored comes first: one module for each picker."""
