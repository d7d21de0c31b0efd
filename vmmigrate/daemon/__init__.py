"""The host daemon: owns the instances of one host, and speaks the control API and the migration protocol."""
