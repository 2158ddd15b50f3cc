"""Files become documents, documents become chunks: finding, reading and cutting, without any state."""
