"""From questions to adapters: what is learned from, how it is trained (in a child process), and how it is examined."""
