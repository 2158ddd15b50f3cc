"""Benchmarks: `python -m tools.bench NAME`. Each measures what is promised, against a baseline of the same run.

retrieval   recall and rank of dense, word and fused search; search time from a thousand to a million chunks
overhead    our engine and embedder against bare loops over the same libraries
answers     right answers, citations and refusals on questions with known answers
ttft        seconds to the first token with kept passages, against plain prefill and the question alone
splicing    what moved passages cost in quality, by codec and link tokens
codec       size, speed and error of the KV codecs
throughput  questions a second on a Zipf trace, with hit rates; eviction against LRU and LFU
clustering  what clusters of passages cover of coming questions, and what a longer log changes
adapters    what adapters keep of passages, beside rivals; what they cost in time and bytes, and while they are trained
"""
