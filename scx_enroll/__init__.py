"""Gets the SCOM agent's TLS certificate signed by Active Directory Certificate Services, and keeps it so."""

__version__ = "0.4.0"  # its one home: setup.py reads this line, and an idle run pays for no importlib.metadata
