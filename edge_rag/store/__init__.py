"""What is kept on disk: the library, its cache and the model files."""
