"""The Unix socket: OpenAI-shaped and native routes over one library, for applications on this machine."""
