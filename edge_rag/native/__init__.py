"""The only importers of foreign engines; each maps their failures to ours."""
