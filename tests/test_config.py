"""The operator's configuration: everything wrong is told at once, where it stands and in words; nothing is guessed."""

import dataclasses
import difflib
import os
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scx_enroll import config
from scx_enroll.config import CA, Agent, Config, Host, Renewal, Report, load
from scx_enroll.errors import ConfigError, HostError, Unconfigured
from scx_enroll.rootfs import Root

SAMPLE = """\
[host]
name = auto                  # the FQDN the Management Server connects to; {hostname} stands for the short host name
alternative-names =          # further DNS names, separated by spaces

[ca]                         # or, for several, [ca NAME] each
server = ca01.corp.example   # host or host:port, always HTTPS
template = SCXAgent          # the template's name (cn), not its display name
auth = kerberos              # kerberos | ntlm | basic | certificate
user =                       # ntlm, basic
password-file =              # default: the systemd credential, then /etc/scx-enroll/password
keytab =                     # kerberos: default /etc/krb5.keytab, and its machine principal
principal =
proxy =                      # none unless given
client-certificate =         # certificate: PEM files
client-key =
server-trust = system        # or a PEM file: who may sign the CA's HTTPS certificate
issuer-trust = /etc/scx-enroll/ca.pem   # the roots that the agent's certificate must lead to
require-revocation = no      # refuse a certificate that names no CRL or OCSP address
require-cn = yes             # refuse one whose CN is not the FQDN

[renewal]
at = 2/3                     # of the certificate's real lifetime
spread = 1/10                # hosts renew over this part of the lifetime before that
certificates-per-day = 3     # issued, or possibly issued
submissions-per-day = 24     # in all, refused ones included
pending-days = 30

[agent]
layout = auto
port = auto                  # from omiserver.conf
activation = restart         # restart | reload
key = agent                  # agent: the agent's own key stays; new: a new key with each certificate
new-key = rsa:3072           # what a new key is
minimum-key =                # e.g. rsa:3072: refuse weaker ones
settle = 2m                  # how long the agent's files must be quiet before we touch them
restart-window =             # e.g. 02:00-05:00; a rollback is done at any hour

[report]
metrics =                    # a file for the node_exporter textfile collector
"""
MINIMAL = "[ca]\nserver = ca01.corp.example\ntemplate = SCXAgent\nauth = basic\nuser = enroll\n"
PATH = "etc/scx-enroll/scx-enroll.conf"


@pytest.fixture
def base(tmp_path):
    (tmp_path / "etc/scx-enroll/conf.d").mkdir(parents=True)
    return tmp_path


def write(base, text, name=PATH):
    path = base / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o644)
    return load(Root(str(base)))


def problems(base, text):
    with pytest.raises(ConfigError) as refused:
        write(base, text)
    return refused.value.message.split("\n")


def only_problem(base, text):
    """The one thing that is wrong with a line added to what works."""
    found = problems(base, text)
    assert len(found) == 1, found
    return found[0]


def test_the_documented_sample_loads(base):
    """The sample is what operators start from: Kerberos, and every other key at its default."""
    loaded = write(base, SAMPLE)
    assert loaded == Config(
        host=Host(),
        cas=(CA(server="ca01.corp.example", template="SCXAgent"),),
        renewal=Renewal(),
        agent=Agent(),
        report=Report(),
    )


def test_the_sample_states_the_defaults(base):
    """What a sample shows as default must be what happens when the line is missing."""
    kept = [line for line in SAMPLE.splitlines() if not line.startswith(("auth", "user"))]
    shown = write(base, "\n".join(kept).replace("[ca]", "[ca]\nauth = basic\nuser = enroll"))
    assert shown == write(base, MINIMAL)


def test_every_setting_has_its_key():
    """A field that no key sets, or a key that sets no field, would be a promise not kept."""
    for section, kind in {"host": Host, "ca": CA, "renewal": Renewal, "agent": Agent, "report": Report}.items():
        fields = {field.name for field in dataclasses.fields(kind)} - {"label"}
        keys = {key.replace("-", "_").replace("settle", "settle_s") for key in config._KEYS[section]}
        assert keys == fields


def test_all_of_it_can_be_set(base):
    """Each value arrives as what it means."""
    loaded = write(
        base,
        "[host]\nname={hostname}.mgmt.corp.example\nalternative-names=A.corp.example  b\n"
        "[ca one]\nserver=CA01.corp.example:8443\ntemplate=SCX Agent (v2)\nauth=basic\nuser=enroll\npassword-file=/etc/pw\n"
        "proxy=http://proxy.corp.example:3128\nserver-trust=/etc/https.pem\nissuer-trust=/etc/roots.pem\n"
        "require-revocation=yes\nrequire-cn=no\n"
        "[ca two]\nserver=192.0.2.7\ntemplate=t\nauth=basic\nuser=u\n"
        "[renewal]\nat=0.5\nspread=0\ncertificates-per-day=20\nsubmissions-per-day=200\npending-days=1\n"
        "[agent]\nlayout=classic-omi\nport=5986\nminimum-key=ec:secp384r1\nsettle=30m\n"
        "activation=reload\nrestart-window=22:30-01:00, 02:00-05:00 23:00-24:00\n",
    )
    assert loaded.host == Host("{hostname}.mgmt.corp.example", ("a.corp.example", "b"))
    one, two = loaded.cas
    assert one == CA(
        label="one",
        server="ca01.corp.example:8443",
        template="SCX Agent (v2)",
        auth="basic",
        user="enroll",
        password_file="/etc/pw",
        proxy="http://proxy.corp.example:3128",
        server_trust="/etc/https.pem",
        issuer_trust="/etc/roots.pem",
        require_revocation=True,
        require_cn=False,
    )
    assert (two.label, two.server) == ("two", "192.0.2.7")
    assert loaded.renewal == Renewal(Fraction(1, 2), Fraction(0), 20, 200, 1)
    windows = ((1350, 60), (120, 300), (1380, 1440))
    assert loaded.agent == Agent("classic-omi", 5986, "reload", minimum_key="ec:secp384r1", settle_s=1800, restart_window=windows)


def test_everything_wrong_is_told_at_once_in_order(base):
    """An operator mends a file in one go, from the top."""
    (base / "etc/scx-enroll/conf.d/10.conf").write_text("[agent]\nsettle = 3d\n")
    found = problems(
        base,
        "server = early\n[ca]\nsevrer = ca01\nserver = https://ca01/certsrv\ntemplate = a:b\nauth = basic\n[rneewal]\nat = 9\nno sense\n[host\n",
    )
    assert found == [
        f"/{PATH}:1: server stands before any section",
        f"/{PATH}:3: unknown key sevrer in [ca], did you mean server?",
        f"/{PATH}:4: server: 'https://ca01/certsrv' is not host or host:port: give no scheme and no path, HTTPS is always used",
        f"/{PATH}:5: template: 'a:b' is not a template's name: letters, digits, blanks and ()_.-",
        f"/{PATH}:6: auth = basic needs user",
        f"/{PATH}:7: unknown section [rneewal], did you mean renewal?",
        f"/{PATH}:9: neither [section] nor key = value",
        f"/{PATH}:10: not of the form [section] or [ca NAME]",
        "/etc/scx-enroll/conf.d/10.conf:2: settle: '3d' is not a time such as 30s or 2m, of at most 30m",
    ]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("host", "name = host1"),
        ("host", "name = localhost.localdomain"),
        ("host", "name = {host}.corp.example"),
        ("host", "name = {hostname}"),
        ("host", "name = {hostname}.{hostname}.corp.example"),
        ("host", "alternative-names = good.corp.example 192.0.2.7"),
        ("ca", "server = ca01/certsrv"),
        ("ca", "server = ca01:0"),
        ("ca", "server = ca01:65536"),
        ("ca", "server = ca01:"),
        ("ca", "server = user@ca01"),
        ("ca", "server = ca..corp.example"),
        ("ca", "server = -ca"),
        ("ca", "server = " + "a" * 250 + "/"),
        ("ca", "template = x\\r\\nSAN:dns=evil"),
        ("ca", "template = " + "x" * 65),
        ("ca", "auth = digest"),
        ("ca", "user = a:b"),
        ("ca", "password-file = secret"),
        ("ca", "password-file = /etc/../secret"),
        ("ca", "proxy = proxy.corp.example"),
        ("ca", "proxy = http://user:secret@proxy.corp.example"),
        ("ca", "server-trust = none"),
        ("ca", "issuer-trust = system"),
        ("ca", "require-cn = true"),
        ("renewal", "at = 0"),
        ("renewal", "at = 3/2"),
        ("renewal", "at = 1/0"),
        ("renewal", "at = -1/3"),
        ("renewal", "at = 1e-1"),
        ("renewal", "spread = 2/3"),
        ("renewal", "certificates-per-day = 0"),
        ("renewal", "certificates-per-day = 21"),
        ("renewal", "submissions-per-day = 201"),
        ("renewal", "submissions-per-day = many"),
        ("renewal", "pending-days = 366"),
        ("renewal", "pending-days = ٣"),
        ("agent", "layout = OMI"),
        ("agent", "port = 0"),
        ("agent", "port = 65536"),
        ("agent", "minimum-key = rsa:1024"),
        ("agent", "minimum-key = rsa"),
        ("agent", "minimum-key = ec:secp256k1"),
        ("agent", "minimum-key = dsa:2048"),
        ("agent", "settle = 31m"),
        ("agent", "settle = 2"),
        ("agent", "settle = -1m"),
        ("agent", "restart-window = 02:00"),
        ("agent", "restart-window = 2:00-5:00"),
        ("agent", "restart-window = 02:00-05:00 to 06:00"),
        ("agent", "restart-window = 02:00-02:00"),
        ("agent", "restart-window = 24:00-02:00"),
        ("agent", "restart-window = 02:00-25:00"),
        ("agent", "restart-window = 02:00-05:60"),
        ("agent", "restart-window = 02:00-24:01"),
        ("agent", "restart-window = never"),
        ("report", "metrics = out.prom"),
    ],
)
def test_a_value_out_of_bounds_is_refused_where_it_stands(base, section, line):
    """Found when the file is read, not months later when a renewal fails."""
    key = line.split(" ", 1)[0]
    text = MINIMAL if section != "ca" else "".join(kept + "\n" for kept in MINIMAL.splitlines() if not kept.startswith(f"{key} "))
    text += f"[{section}]\n{line}\n" if section != "ca" else f"{line}\n"
    assert only_problem(base, text).startswith(f"/{PATH}:{text.count(chr(10))}: ")


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("report", "metrics = /var/lib/x.prom"),
    ],
)
def test_what_this_version_does_not_do_is_refused(base, section, line):
    """An operator who asked for it must not believe to have it."""
    text = f"{MINIMAL}[{section}]\n{line}\n"
    assert only_problem(base, text).endswith(f"{line} is not available in this version")


@pytest.mark.parametrize(
    ("auth", "lines"),
    [
        ("", ""),
        ("kerberos", "keytab = /etc/scx-enroll/host.keytab\nprincipal = HOST1$\n"),
        ("ntlm", "user = CORP\\enroll\npassword-file = /etc/p\n"),
        ("basic", "user = enroll@corp.example\n"),
        ("certificate", "client-certificate = /etc/c.pem\nclient-key = /etc/k.pem\n"),
    ],
)
def test_each_way_to_sign_in_has_its_keys(base, auth, lines):
    """auth unset means kerberos."""
    (ca,) = write(base, f"[ca]\nserver = c\ntemplate = t\nauth = {auth}\n{lines}").cas
    assert ca.auth == (auth or "kerberos")


@pytest.mark.parametrize(
    ("auth", "line", "problem"),
    [
        ("kerberos", "user = enroll", "user is for auth = ntlm or basic, not kerberos"),
        (
            "", "password-file = /etc/p",
            "password-file is for auth = ntlm or basic, but auth is not set, and kerberos is the default: set auth, or take password-file out",
        ),
        ("kerberos", "client-key = /etc/k.pem", "client-key is for auth = certificate, not kerberos"),
        ("basic", "user = u\nkeytab = /etc/k", "keytab is for auth = kerberos, not basic"),
        ("ntlm", "user = u\nprincipal = HOST1$", "principal is for auth = kerberos, not ntlm"),
        ("ntlm", "", "auth = ntlm needs user"),
        ("certificate", "client-key = /etc/k.pem", "auth = certificate needs client-certificate"),
        ("certificate", "client-certificate = /etc/k.pem", "auth = certificate needs client-key"),
    ],
)
def test_a_key_of_another_way_to_sign_in_is_not_ignored(base, auth, line, problem):
    """Who writes a password file beside Kerberos believes that it is used."""
    assert only_problem(base, f"[ca]\nserver = c\ntemplate = t\nauth = {auth}\n{line}\n").endswith(problem)


@pytest.mark.parametrize("server", ["192.0.2.7", "192.0.2.7:8443"])
def test_kerberos_by_address_is_refused_at_once(base, server):
    """No domain has tickets for addresses; with Basic it is possible."""
    text = f"[ca]\nserver = {server}\ntemplate = t\n"
    assert "there are no tickets for addresses" in only_problem(base, text)
    write(base, f"{text}auth = basic\nuser = u\n")


@pytest.mark.parametrize("missing", ["server", "template", "user"])
def test_what_a_ca_needs_is_asked_for(base, missing):
    """Each CA has a server, a template and, for basic, a user."""
    text = MINIMAL + MINIMAL.replace("[ca]", "[ca b]").replace(f"{missing} =", f"{missing} = #")
    text = text.replace("[ca]", "[ca a]")
    expected = {"user": "auth = basic needs user"}.get(missing, f"{missing} is not set")
    assert only_problem(base, text).endswith(expected)


def test_later_files_win_in_name_order(base):
    """A fleet's file is refined by what configuration management drops beside it; other files there are not ours."""
    folder = base / "etc/scx-enroll/conf.d"
    (folder / "20.conf").write_text("[agent]\nsettle = 20s\n[ca]\nuser = second\n")
    (folder / "10.conf").write_text("[agent]\nsettle = 10s\nport = 1270\n")
    (folder / "30.conf~").write_text("nonsense")
    (folder / "README").write_text("nonsense")
    loaded = write(base, MINIMAL + "[agent]\nsettle = 1s\nlayout = omi\n")
    assert loaded.agent == Agent(settle_s=20, port=1270, layout="omi")
    assert loaded.cas[0].user == "second"


def test_an_empty_value_means_the_default(base):
    """A later file can take back what an earlier one set."""
    (base / "etc/scx-enroll/conf.d/10.conf").write_text("[agent]\nsettle =\n")
    assert write(base, MINIMAL + "[agent]\nsettle = 1s\n").agent.settle_s == Agent().settle_s


def test_a_key_stands_once_in_a_file(base):
    """Of two lines one is a mistake, and which one only the operator knows; a section may be opened again."""
    assert only_problem(base, MINIMAL + "user = other\n").endswith("user stands in line 5 too")
    assert only_problem(base, MINIMAL + "[agent]\nport = 1\n[ca]\nuser =\n").endswith("user stands in line 5 too")
    assert write(base, MINIMAL + "[agent]\nport = 1270\n[ca]\nrequire-cn = no\n").cas[0].require_cn is False


def test_named_and_unnamed_cas_do_not_mix(base):
    """A plain [ca] beside named ones is one forgotten when the others were added."""
    assert "[ca] can't stand beside [ca NAME]" in only_problem(base, MINIMAL + MINIMAL.replace("[ca]", "[ca b]"))


@pytest.mark.parametrize("header", ["[agent x]", "[ca a b]", "[ca ü]", "[ca " + "x" * 33 + "]", "[]", "[ca", "[ca]x", "[[ca]]", "[CA]"])
def test_a_header_that_is_not_known_is_refused_once(base, header):
    """The keys below it are not complained about one by one."""
    assert only_problem(base, MINIMAL + header + "\nfoo = bar\nbaz = 1\n").startswith(f"/{PATH}:6: ")


def test_a_key_of_another_section_is_sent_there(base):
    """The commonest mistake is the right key in the wrong place."""
    assert only_problem(base, MINIMAL + "settle = 1m\n").endswith("unknown key settle in [ca], it belongs into [agent]")


def test_comments_stand_alone_or_after_a_blank(base):
    """A # inside a word belongs to it, as in a user's name."""
    text = MINIMAL.replace("user = enroll", "user = en#roll\t# who\n; more\n  # more") + "password-file = #none\n"
    loaded = write(base, text)
    assert loaded.cas[0].user == "en#roll"
    assert loaded.cas[0].password_file == ""


def test_files_from_windows_are_read(base):
    """CRLF and a missing last line end are no mistakes; a byte order mark is, and is told."""
    assert write(base, MINIMAL.replace("\n", "\r\n").rstrip()) == write(base, MINIMAL)
    assert "can't be printed" in only_problem(base, "\ufeff# comment\n" + MINIMAL)


@pytest.mark.parametrize(
    ("bad", "why"), [(b"# \0\n", "can't be printed"), (b"# \xff\n", "not UTF-8"), ("# a\u2028b\n".encode(), "can't be printed")]
)
def test_bytes_that_are_no_text_are_refused_where_they_stand(base, bad, why):
    """What an editor doesn't show must not change what is meant."""
    found = only_problem(base, MINIMAL.encode() + bad)
    assert found.startswith(f"/{PATH}:6: ")
    assert why in found


def test_no_file_or_no_server_is_no_mistake(base):
    """A package just installed waits to be configured: an unattended run succeeds."""
    with pytest.raises(Unconfigured, match="there is no"):
        load(Root(str(base)))
    for text in ("", "[ca]\n", "[ca]\nserver =\ntemplate = SCXAgent\n", "[agent]\nsettle = 1m\n"):
        with pytest.raises(Unconfigured, match="no certification authority"):
            write(base, text)
    with pytest.raises(ConfigError) as refused:
        write(base, "[ca]\nserver =\nfoo = 1\n")
    assert not isinstance(refused.value, Unconfigured)


def test_an_image_may_come_with_drop_ins_alone(base):
    """conf.d is enough."""
    (base / "etc/scx-enroll/conf.d/site.conf").write_text(MINIMAL)
    assert load(Root(str(base))).cas[0].server == "ca01.corp.example"


def test_another_file_has_its_own_conf_d(base):
    """`--config` moves all of it."""
    (base / "srv").mkdir()
    (base / "srv/x.conf").write_text(MINIMAL)
    (base / "etc/scx-enroll/conf.d/site.conf").write_text("nonsense")
    assert load(Root(str(base)), "/srv/x.conf").cas[0].user == "enroll"


def test_a_link_to_nothing_is_not_the_absence_of_configuration(base):
    """A mount that is missing must not look like a fresh installation."""
    (base / PATH).symlink_to("/mnt/scx-enroll.conf")
    with pytest.raises(ConfigError, match="link to nothing"):
        load(Root(str(base)))


def test_a_file_others_can_write_is_refused(base):
    """Who writes it decides whom root sends requests to, and what it trusts."""
    write(base, MINIMAL)
    (base / PATH).chmod(0o664)
    with pytest.raises(HostError) as refused:
        load(Root(str(base)))
    assert refused.value.hint == f"chmod go-w /{PATH}"


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root: files of another user")
def test_a_file_of_another_user_is_refused(base):
    """Its owner can write it, whatever its mode."""
    write(base, MINIMAL)
    os.chown(base / PATH, 65534, 65534)
    with pytest.raises(HostError, match="belongs to user 65534"):
        load(Root(str(base)))


def test_too_much_is_refused(base):
    """A log file in the wrong place is not read for an hour."""
    with pytest.raises(HostError, match="longer than"):
        write(base, "#" * (config.MAX_FILE_BYTES + 1))
    (base / PATH).unlink()
    for number in range(config.MAX_FILES + 1):
        (base / "etc/scx-enroll/conf.d" / f"{number}.conf").touch()
    with pytest.raises(ConfigError, match="more than 64 files"):
        load(Root(str(base)))


def test_no_value_takes_long_to_refuse(base):
    """The patterns don't backtrack: long lines cost no more than their length."""
    text = "".join(f"[{section}]\n" + "".join(f"{key} = {'a.' * 900}!\n" for key in keys) for section, keys in config._KEYS.items())
    assert len(problems(base, text)) >= sum(map(len, config._KEYS.values()))


words = st.sampled_from(
    [word for keys in config._KEYS.values() for word in keys] + [*config._KEYS, "ca x", "yes", "1", "/a", "a.b", "basic", "#", "2/3"]
)
lines = st.one_of(words.map("[{}]".format), st.builds("{} = {}".format, words, st.one_of(words, st.text(max_size=8))), st.text(max_size=20))
texts = st.one_of(
    st.lists(lines, max_size=12).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=60)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
def test_any_file_is_read_or_refused_by_line(base, data):
    """Whatever stands in it: a Config, or a ConfigError whose every line says where."""
    try:
        loaded = write(base, data)
    except Unconfigured:
        return
    except ConfigError as refused:
        assert all(line.startswith(f"/{PATH}:") for line in refused.message.split("\n"))
        assert refused.hint
        return
    assert all(ca.server and ca.template and ca.auth == "basic" and ca.user for ca in loaded.cas)
    assert loaded.renewal.spread < loaded.renewal.at


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted({key for keys in config._KEYS.values() for key in keys})), st.data())
def test_one_wrong_letter_is_noticed_and_the_nearest_key_named(base, key, data):
    """A typing mistake never silently means the default."""
    at = data.draw(st.integers(0, len(key) - 1))
    typo = key[:at] + data.draw(st.sampled_from("qz")) + key[at + 1 :]
    section = next(name for name, keys in config._KEYS.items() if key in keys)
    known = list(config._KEYS[section])
    if typo not in known:
        message = problems(base, f"[{section}]\n{typo} = 1\n")
        near = difflib.get_close_matches(typo, known, 1)
        assert any(f"unknown key {typo}" in line and (not near or f"did you mean {near[0]}?" in line) for line in message)


@pytest.mark.parametrize("other", ["ca01.corp.example", "CA01.corp.example", "ca01.corp.example:443"])
def test_two_cas_on_one_server(base, other):
    """Request IDs, refusals and passwords are remembered by server: two sections would answer for each other."""
    one = "[ca {}]\nserver = {}\ntemplate = T\nauth = basic\nuser = u\n"
    found = only_problem(base, one.format("a", "ca01.corp.example") + one.format("b", other))
    assert found.endswith(":7: server: ca01.corp.example stands in another section too")
    assert len(write(base, one.format("a", "ca01.corp.example") + one.format("b", "ca01.corp.example:8443")).cas) == 2
