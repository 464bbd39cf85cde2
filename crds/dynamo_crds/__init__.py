"""The custom resources: models, loading and explaining manifests, conversion, generated CRDs."""
