"""`python -m edge_rag` is `edge-rag`."""

from edge_rag.cli import main

main()
