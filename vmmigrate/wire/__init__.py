"""The migration protocol without I/O: phases, messages, framing, codec, negotiation, session."""
