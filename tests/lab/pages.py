"""AD CS's pages as text (facts 1 and 2): CRLF, unquoted attributes, mixed case, unclosed elements; in what bytes is `wire`'s matter."""

from __future__ import annotations

import html
import re

from . import messages
from .authority import ANONYMOUS, MANAGER, NO_SUCH_REQUEST, Authority, Row
from .switches import Switches
from .texts import NATIVE_DIGITS, RIGHT_TO_LEFT, TEXTS

# MS-WCCE 3.2.1.4.2.1.3; a failed request's is its HRESULT
DISPOSITIONS = {"denied": 2, "issued": 3, "pending": 5, "revoked": 6}
RPC_NOT_STARTED = 0x800706BA  # RPC_S_SERVER_UNAVAILABLE, the only one that comes with "has not been started"

_TAG = re.compile(r"</?[A-Za-z]+|\s[A-Za-z-]+(?==)")


class Pages:
    """Renders pages; `mozilla` tells whether the client calls itself a browser."""

    def __init__(self, authority: Authority, switches: Switches) -> None:
        """Take what the pages are about, and the switches that shape them."""
        self.authority = authority
        self.switches = switches

    def _text(self, name: str, **values: str) -> str:
        text = TEXTS[self.switches.language][name]
        if self.switches.digits == "native" and self.switches.language in NATIVE_DIGITS:
            native = NATIVE_DIGITS[self.switches.language]
            text = text.translate(native)
            if "id" in values:
                values["id"] = values["id"].translate(native)
        return text.format(**values)

    def _id(self, name: str) -> str:
        quote = self.switches.id_quote
        named = f"ID={quote}{name}{quote}"
        shapes = {
            "spaced": f"  ID = {quote}{name}{quote} ",
            "among": f'Class="t1" Align=Left {named} Style="margin:7px" NoWrap',
            "wrapped": f"Align=Left\r\n\t{named}\r\n\tNoWrap",
        }
        return shapes.get(self.switches.id_shape, named)

    def _page(self, title: str, *lines: str) -> str:
        direction = " Dir=rtl" if self.switches.language in RIGHT_TO_LEFT else ""
        head = [
            '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01 Transitional//EN">',
            f"<HTML{direction}>",
            "<Head>",
            f'\t<Meta HTTP-Equiv="Content-Type" Content="text/html; charset={self.switches.page_charset.upper()}">',
            "\t<Title>Microsoft Active Directory Certificate Services</Title>",
            "</Head>",
            '<Body BgColor=#FFFFFF Link=#0000FF VLink=#0000FF ALink=#0000FF><Font ID=locPageFont Face="Arial">',
            "<Table Border=0 CellSpacing=0 CellPadding=4 Width=100% BgColor=#008080>",
            (
                '<TR><TD><Font Color=#FFFFFF><LocID ID=locMSCertSrv><Font Face="Arial" Size=-1><B><I>Microsoft</I></B> Active '
                f"Directory Certificate Services &nbsp;--&nbsp; {html.escape(self.authority.name)} 2016 &nbsp;</Font></LocID></Font>"
                '</TD><TD ID=locHomeAlign Align=Right><A Href="/certsrv"><Font Color=#FFFFFF><LocID ID=locHomeLink>Home</LocID>'
                "</Font></A></TD></TR>"
            ),
            "</Table>",
            "",
            f"<P {self._id('locPageTitle')}> <Font Color=#FF0000><B> {title} </B></Font>",
            "<!-- Green HR --><Table Border=0 CellSpacing=0 CellPadding=0 Width=100%><TR><TD BgColor=#008080></TD></TR></Table>",
            "",
        ]
        text = "\r\n".join([*head, *lines, "", "</Font>", "</Body>", "</HTML>", ""])
        if self.switches.lower_case:
            text = re.sub(r"<[A-Za-z/][^<>]*>", lambda tag: _TAG.sub(lambda word: word.group().lower(), tag.group()), text)
        return text

    def _said(self, text: str) -> str:
        return html.escape(text) if self.switches.escape else text

    def welcome(self) -> str:
        """Return the start page."""
        return self._page("Welcome", '<P><A Href="certrqus.asp">Request a certificate</A>', '<P><A Href="certckpn.asp">View</A>')

    def renewals(self) -> str:
        """Return certcarc.asp, which tells the index of the newest CA certificate in a script."""
        told = self.switches.nrenewals
        count = self.authority.newest.index if told < 0 else told
        lines = ['<Script Language="JavaScript">', f"\tvar nRenewals={count};", "</Script>"]
        if self.switches.certcarc == "missing":
            lines = []
        return self._page("Download a CA Certificate, Certificate Chain, or CRL", *lines)

    # certfnsh.asp

    def outcome(self, row: Row, *, mozilla: bool) -> str:
        """Return what a submission or a browser's poll shows for a row."""
        if row.state in ("issued", "revoked"):
            return self.issued(row, mozilla=mozilla)
        return self.pending(row) if row.state == "pending" else self.denied(row)

    def issued(self, row: Row, *, mozilla: bool) -> str:
        """Return the page after a certificate was issued: numbered links, or for browsers a script holding the id."""
        number, renewal = row.id, self.authority.newest.index
        intro = f"<P {self._id('locInfo')}> {self._text('issued')}</P>"
        install = f"certnew.cer?ReqID=CACert&amp;Renewal={renewal}&amp;Mode=inst&amp;Enc=b64"
        if mozilla:
            return self._page(
                self._text("issued-title"),
                intro,
                '<Script Language="JavaScript">',
                '\tfunction getEncoding() { return document.UIForm.rbEncoding[0].checked ? "Enc=bin" : "Enc=b64"; }',
                f'\tfunction handleGetCert() {{ location="certnew.cer?ReqID={number}&"+getEncoding(); }}',
                f'\tfunction handleGetChain() {{ location="certnew.p7b?ReqID={number}&"+getEncoding(); }}',
                "</Script>",
                "<Form Name=UIForm>",
                "<Input Type=Radio Name=rbEncoding Checked><LocID ID=locDerEnc>DER</LocID>",
                "<Input Type=Radio Name=rbEncoding><LocID ID=locB64Enc>Base 64</LocID>",
                '<P><A Href="javascript:handleGetCert()" ID=locDownloadCert>Download certificate</A>',
                '<P><A Href="javascript:handleGetChain()" ID=locDownloadCertChain>Download certificate chain</A>',
                "</Form>",
            )
        return self._page(
            self._text("issued-title"),
            intro,
            f'<A Href="certnew.cer?ReqID={number}&amp;Enc=bin">DER</A> <A Href="certnew.cer?ReqID={number}&amp;Enc=b64">Base 64</A>',
            f'<P><A Href="certnew.p7b?ReqID={number}&amp;Enc=bin">DER</A>',
            f'<A Href="certnew.p7b?ReqID={number}&amp;Enc=b64">Base 64</A>',
            f'<P><A Href="{install}">CA</A>',
        )

    def pending(self, row: Row) -> str:
        """Return the page of a request that waits for a certificate manager."""
        return self._page(
            self._text("pending-title"),
            f"<P {self._id('locInfoNewReq')}> {self._text('pending')} </P>",
            f"<P {self._id('locInfoReqID')}>",
            self._text("id", id=str(row.id)),
            "</P>",
            f"<P {self._id('locTimeoutWarning')}> {self._text('timeout')} </P>",
        )

    def denied(self, row: Row) -> str:
        """Return the denied page in the shape that `deny_page` asks for; the reason is HTML-escaped only with `escape`."""
        kind = self.switches.deny_page
        message = disposition(row, code=kind != "no-code")
        if kind == "echo":
            message = "certnew.cer?ReqID=7& " + message
        lines = [f"<P {self._id('locDenied')}> {self._text('denied')} </P>"]
        if kind != "bare":
            name = "reason-no-id" if kind == "no-id" else "reason"
            lines += [
                f"<P {self._id('locInfoReqIDandReason')}>",
                self._text(name, id=str(row.id), message=self._said(message) + "\r\n"),
                "</P>",
                f"<P {self._id('locContactAdmin')}> {self._text('contact')} </P>",
            ]
        return self._page(self._text("denied-title"), *lines)

    # certnew.cer and certnew.p7b where there is nothing to download

    def no_certificate(self, row: Row) -> str:
        """Return what certnew.cer shows for a request without a certificate to hand out: disposition, message, last status.

        What is known of a real one is the poll of a pending request; that the others look alike, and the LastStatus of a revoked
        one, is unconfirmed (facts 2.3 and 11.1).
        """
        number = DISPOSITIONS.get(row.state, row.hresult - (1 << 32))
        # a revocation leaves no status of its own that the facts would know of
        status = self.switches.revoked_status if row.state == "revoked" else row.hresult
        lines = [f"<B>{self._text('disposition')}</B>\t\t{number}<LocID {self._id('locDispSpacer')}> - </LocID>"]
        if not self.switches.spacer:
            lines = []
        lines += [
            f"<B>{self._text('message')}</B>\t\t{self._said(disposition(row))}",
            f"<B>{self._text('status')}</B>\t\t{messages.text(status, row.language)} {messages.coded(status)}",
        ]
        return self._error(*lines)

    def foreign(self) -> str:
        """Return the page for somebody else's request where that is told by disposition 0; unconfirmed."""
        return self._error(f"<B>{self._text('disposition')}</B>\t\t0<LocID {self._id('locDispSpacer')}> - </LocID>")

    def _error(self, *lines: str) -> str:
        return self._page(
            self._text("error"), f"<P {self._id('locErrorMsg')}> {self._text('unexpected')}", "<P>", "\r\n<BR>".join(lines)
        )

    def failure(self, hresult: int) -> str:
        """Return an error page that names an HRESULT and has none of the outcomes' element IDs."""
        message = f"{messages.text(hresult, self.authority.language)} {messages.coded(hresult)}"
        return self._page(self._text("error"), self._text("unexpected"), f"<P>{message}")

    def stopped(self) -> str:
        """Return the page of a web role whose call to CertSvc failed [the facts page marks it as reported only]."""
        hresult = self.switches.unavailable_hresult
        why = self._text("not-started") if hresult == RPC_NOT_STARTED else ""
        message = f"{messages.text(hresult, self.authority.language)} {messages.coded(hresult)}"
        return self._page(self._text("error"), self._text("unexpected"), why, f"<P>{message}")


def disposition(row: Row, *, code: bool = True) -> str:
    """Return a row's disposition message in the CA's language, as the request table keeps it."""
    words = messages.words(row.words, row.language, MANAGER)
    shown = messages.code(row.hresult) if code and row.hresult else ""
    if row.words in ("policy", "constructing"):
        return f"{words}  {shown}, {row.message}" if shown else f"{words}  {row.message}"
    if row.words == "parsing":
        return f"{words}  {row.message} {shown}".rstrip()
    if row.words == "manager" and shown:
        return f"{words} {messages.coded(row.hresult)}"
    return words


def readable(row: Row, account: str, foreign: str) -> bool:
    """Tell whether an account may read a row: its own always."""
    return foreign == "readable" or row.requester in (account, ANONYMOUS)


__all__ = ["NO_SUCH_REQUEST", "Pages", "disposition", "readable"]
