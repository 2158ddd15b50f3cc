"""What ships with the package about models: the manifest. Weights are fetched, never committed."""
