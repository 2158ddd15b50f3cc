"""Pure decisions: values in, values out. No clock, no disk, no thread, no randomness of their own."""
