"""The `edge-rag` command. Results go to standard output, progress and complaints to standard error."""

from edge_rag.cli.app import main

__all__ = ["main"]
