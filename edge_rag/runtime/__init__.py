"""Where policy meets disk and engine."""
