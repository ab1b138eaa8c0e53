"""Every failure an operator can see: the fact, the next act, and the exit status.

The statuses are a promise (docs/exit-status.md); each stands on its class and nowhere else.
"""

from typing import ClassVar


class EnrollError(Exception):
    """A failure with a message, a hint and an exit status; by itself, a defect of this program."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EnrollError):
    """The command line makes no sense."""

    exit_status = 2


class ConfigError(EnrollError):
    """The configuration can't be used as it is."""

    exit_status = 3


class Unconfigured(ConfigError):
    """No certification authority is configured yet; an unattended run says so and succeeds."""


class AgentNotReady(EnrollError):
    """No agent was found, or what was found can't be worked on yet."""

    exit_status = 4


class NeedsPerson(AgentNotReady):
    """No time mends it: an unattended run fails."""


class NotServed(NeedsPerson):
    """The agent does not serve what its files hold, though it was restarted; an unattended run fails when it is so again."""


class Sealed(AgentNotReady):
    """This host is an image's, and nothing is done until its clone is another machine; an unattended run says so and succeeds."""


class CAUnreachable(EnrollError):
    """The certification authority gave no usable answer."""

    exit_status = 5


class CARefused(EnrollError):
    """The certification authority said no."""

    exit_status = 6


class RequestPending(EnrollError):
    """The request waits for the certification authority's operator."""

    exit_status = 7


class CertificateRefused(EnrollError):
    """The certificate is not the one that this host wants."""

    exit_status = 8


class RolledBack(EnrollError):
    """The agent did not serve the new certificate, and serves the previous one again."""

    exit_status = 9


class RollbackFailed(EnrollError):
    """The agent serves neither the new certificate nor the previous one."""

    exit_status = 10


class Busy(EnrollError):
    """Another run holds the lock."""

    exit_status = 11


class HostError(EnrollError):
    """This host stands in the way: disk, permission, or not root."""

    exit_status = 12


class SigninRefused(EnrollError):
    """The certification authority's web server did not accept who we are."""

    exit_status = 13
