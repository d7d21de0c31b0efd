"""`vmmigrate pki`: a certificate authority for small sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from vmmigrate.cli.options import OutputOption, Repeated
from vmmigrate.errors import UsageError

app = App(name="pki", help="Certificates for small sites: a CA in a directory, and what it issues.")


@app.command
def init(
    directory: Annotated[Path, Parameter(name="DIR", help="Made if it is missing; nothing is overwritten.")],
    /,
    *,
    trust_domain: Annotated[str, Parameter(help="Goes into every identity: spiffe://<trust domain>/host/<id>.")],
    days: Annotated[int | None, Parameter(help="How long the CA is valid; ten years otherwise.")] = None,
    output: OutputOption = "text",
) -> int:
    """Make a CA: ca.pem and ca-key.pem. Keep the key away from the hosts.

    For example: vmmigrate pki init ca --trust-domain site.example
    """
    from vmmigrate.net import pki

    files = pki.init_authority(directory, trust_domain, pki.DEFAULT_AUTHORITY_DAYS if days is None else days)
    _show({"trust_domain": trust_domain, "certificate": str(files.certificate), "key": str(files.key)}, output)
    return 0


@app.command
def issue(
    directory: Annotated[Path, Parameter(name="DIR", help="Where pki init made the CA.")],
    /,
    *,
    host: Annotated[str | None, Parameter(help="For the daemon of this host.")] = None,
    orchestrator: Annotated[str | None, Parameter(help="For an orchestrator.")] = None,
    operator: Annotated[str | None, Parameter(help="For a person at the command line.")] = None,
    dns: Annotated[list[str] | None, Repeated, Parameter(help="A DNS name to add; may be repeated.")] = None,
    ip: Annotated[list[str] | None, Repeated, Parameter(help="An IP address to add; may be repeated.")] = None,
    days: Annotated[int | None, Parameter(help="How long it is valid; 90 days otherwise.")] = None,
    out: Annotated[
        Path | None, Parameter(help="Write here, with a copy of ca.pem: what --tls-dir and a daemon need.")
    ] = None,
    output: OutputOption = "text",
) -> int:
    """Issue a certificate to exactly one host, orchestrator or operator: NAME.pem and NAME-key.pem.

    Names and addresses are for browsers and curl; vmmigrate itself looks at the identity only.

    For example:

    vmmigrate pki issue ca --host host-a --out host-a

    vmmigrate pki issue ca --operator alice --days 30 --out ~/.config/vmmigrate
    """
    from vmmigrate.cli.issuing import issue_into
    from vmmigrate.net import pki
    from vmmigrate.net.identity import Role

    wanted = {Role.HOST: host, Role.ORCHESTRATOR: orchestrator, Role.OPERATOR: operator}
    parties = [(role, name) for role, name in wanted.items() if name is not None]
    if len(parties) != 1:
        raise UsageError("needed is exactly one of --host, --orchestrator and --operator")
    lifetime_days = pki.DEFAULT_LEAF_DAYS if days is None else days
    _show(issue_into(directory, *parties[0], dns or (), ip or (), lifetime_days, out), output)
    return 0


@app.command
def revoke(
    directory: Annotated[Path, Parameter(name="DIR", help="Where pki init made the CA.")],
    certificate: Annotated[Path, Parameter(name="CERT", help="The certificate that is to be trusted no more.")],
    /,
    *,
    days: Annotated[int | None, Parameter(help="How long the list is valid; 30 days otherwise.")] = None,
    output: OutputOption = "text",
) -> int:
    """Put a certificate on the CA's revocation list, DIR/crl.pem.

    It counts at a daemon once the list is copied to where its setting tls.crl points, and the daemon got SIGHUP.

    For example: vmmigrate pki revoke ca host-a/host-a.pem
    """
    from vmmigrate.net import revocation

    lifetime_days = revocation.DEFAULT_LIST_DAYS if days is None else days
    _show(revocation.revoke(directory, certificate, lifetime_days).as_dict(), output)
    return 0


@app.command
def crl(
    directory: Annotated[Path, Parameter(name="DIR", help="Where pki init made the CA.")],
    /,
    *,
    days: Annotated[int | None, Parameter(help="How long the list is valid; 30 days otherwise.")] = None,
    output: OutputOption = "text",
) -> int:
    """Write the CA's revocation list anew, DIR/crl.pem: the first one, or the same entries for longer.

    Once its list has expired a daemon lets nobody in: renew it in time.

    For example: vmmigrate pki crl ca --days 90
    """
    from vmmigrate.net import revocation

    lifetime_days = revocation.DEFAULT_LIST_DAYS if days is None else days
    _show(revocation.renew(directory, lifetime_days).as_dict(), output)
    return 0


def _show(facts: dict[str, Any], output: str) -> None:
    from vmmigrate.cli.output import print_fields, print_json

    (print_json if output == "json" else print_fields)(facts)
