"""vmmigrate: live migration of virtual machines between hypervisor hosts."""

__version__ = "0.1.0"
