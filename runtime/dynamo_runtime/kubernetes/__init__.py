"""The API server as operator, webhook and pickers use it: raw JSON over one HTTP client.

Importing this package costs aiohttp and msgspec, which every process has anyway; what kubeconfig
files take is imported by the one function that reads them.
"""
