"""Benchmarks: `python -m tools.bench NAME`. Each measures what is promised, against a baseline of the same run.

retrieval   recall and rank of dense, word and fused search; search time from a thousand to a million chunks
overhead    our engine and embedder against bare loops over the same libraries
answers     right answers, citations and refusals on questions with known answers
"""
