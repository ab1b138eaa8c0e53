"""What the pages for operators say is true: their commands run, their messages are shown, their keys exist, their links lead somewhere."""

import errno
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import scx_enroll
from scx_enroll import arguments, config, durable, journal, request
from scx_enroll.errors import HostError
from scx_enroll.rootfs import Root
from tests.lab.agent import LabHost
from tests.lab.authority import pkcs7
from tests.lab.ca import LabCA

PAGES = ("README.md", "CHANGELOG.md", "docs/bench.md", "docs/decisions.md", "docs/exit-status.md", "docs/fleet.md", "docs/packages.md", "docs/sign-in.md", "docs/state.md", "docs/status.md", "packaging/README.md")
PROGRAM = os.path.join(os.path.dirname(sys.executable), "scx-enroll")
USER = "CORP\\svc-scx-enroll"
HOST, DOMAIN = "lin01", "corp.example"

# What a command of the pages means in the lab; {...} are the lab's own. The first that fits, from the left.
IN_THE_LAB = (
    (r"^systemctl .*$", ":"),  # there is no systemd in the tree
    (r"^journalctl .*$", ":"),
    (r"^(?:apt|dnf|zypper) .*$", ":"),
    (r"\bscx-enroll (?=(?:run|check|status|csr|install|submit|ca-cert|hold|release|rollback|seal)\b)", "{program} --root {root} --live "),
    (r"lin01\.corp\.example:1270", "127.0.0.1:{port}"),
    (r"ca01\.corp\.example", "{server}"),
    (r"(?<![\w.}}])/(?=opt/|etc/|usr/)", "{root}/"),
    (r"\b(?=lin01\.(?:csr|p7b)\b|aix01\.(?:csr|pem)\b|corp-root-ca\.cer\b)", "{folder}/"),
)
# Commands that end with something else than 0, because a session in the lab takes seconds where the pages take days.
STATUSES = {"scx-enroll run --accept-name": 2}  # the host of the page is told its name


def text_of(checkout, name):
    with open(os.path.join(checkout, name), encoding="utf-8") as file:
        return file.read()


def blocks(checkout, name, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text_of(checkout, name), re.DOTALL | re.MULTILINE)


class Site:
    """A lab CA and a host as the README describes it."""

    def __init__(self, checkout, folder):
        self.folder = folder
        self.ca = LabCA(folder / "ca", user=USER, first_id=4711)
        self.host = LabHost(folder / "host", host=HOST, domain=DOMAIN, key="rsa:3072")
        self.etc = folder / "host" / "etc" / "scx-enroll"
        (self.etc / "conf.d").mkdir(parents=True)
        self.conf = blocks(checkout, "README.md", "ini")[0]
        shutil.copy(self.ca.issuer_trust, self.etc / "ca.pem")
        self.write("password", self.ca.password + "\n", 0o600)
        bundle = folder / "host" / "etc" / "ssl" / "certs" / "ca-certificates.crt"  # server-trust = system
        bundle.parent.mkdir(parents=True)
        shutil.copy(self.ca.server_trust, bundle)
        # What a lab needs beyond the README: its own port, and no time to rest after the agent's installation.
        # This Python need not have gssapi: a password instead of the domain; tests/test_kerberos.py has the default.
        self.write("conf.d/lab.conf", f"[agent]\nport = {self.host.port}\nsettle = 0s\n[ca]\nauth = basic\nuser = {USER}\n")

    def __enter__(self):
        self.ca.start()
        self.write("scx-enroll.conf", self.conf.replace("ca01.corp.example", self.ca.server))
        assert self.host.start()
        return self

    def __exit__(self, *_):
        self.host.close()
        self.ca.stop()

    def write(self, name, text, mode=0o644):
        path = self.etc / name
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)

    def change(self, old, new):
        text = (self.etc / "scx-enroll.conf").read_text(encoding="utf-8")
        assert old in text
        self.write("scx-enroll.conf", text.replace(old, new))

    def run(self, *arguments):
        """Run the program; returns its status and its output with the lab's names as they stand in the README."""
        ran = subprocess.run(
            (PROGRAM, *arguments, "--root", self.host.root, "--live"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=60,
        )
        return ran.returncode, ran.stdout.replace(self.ca.server, "ca01.corp.example").replace(str(self.host.port), "1270")

    def sign(self, csr, p7b):
        """Do what `certreq -submit` does."""
        row = self.ca.authority.submit(csr.read_bytes(), "SCXAgent", USER)
        p7b.write_bytes(pkcs7([row.certificate, *self.ca.authority.chain(row.generation)]))


@pytest.fixture
def site(checkout, tmp_path):
    with Site(checkout, tmp_path) as made:
        yield made


def in_the_lab(site, line):
    parts = {
        "program": PROGRAM, "root": site.host.root, "port": site.host.port, "server": site.ca.server, "folder": site.folder,
    }
    pieces = "|".join(f"({pattern})" for pattern, _ in IN_THE_LAB).replace("{{", "{").replace("}}", "}")
    return re.sub(pieces, lambda found: IN_THE_LAB[found.lastindex - 1][1].format(**parts), line)


# -- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith("README.md")])
def test_a_command_of_the_pages_does_not_work(checkout, site, page):
    """Every shell command of a page, in its order, on one host; all of it but the installation, which test_packaging runs."""
    (site.folder / "corp-root-ca.cer").write_bytes(ssl.PEM_cert_to_DER_cert(Path(site.ca.issuer_trust).read_text()))
    shells = [block for block in blocks(checkout, page, "sh") if "pip install" not in block]
    assert shells
    if not shutil.which("openssl") and any("openssl" in block for block in shells):
        missing = "openssl is not here: apt-get install openssl"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    for line in "".join(shells).splitlines():
        command = in_the_lab(site, line)
        for path in re.findall(r"(?<![\w.])/[\w.-]+(?:/[\w./-]+)?", re.sub(r"-subj \S+", "", command).replace(PROGRAM, "").replace(str(site.folder), ".")):
            assert path in ("/dev/null", "/dev/stdin"), f"{command} would leave the lab: {path}"
        if line in ("scx-enroll rollback", "scx-enroll install lin01.p7b"):  # as the page says, the restarts of the hour are spent: an hour later
            Path(site.host.root, "var/lib/scx-enroll/budget.json").unlink()
        ran = subprocess.run(
            ["sh", "-euc", command], cwd=site.folder, input=site.ca.password + "\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=60,
        )
        assert ran.returncode == STATUSES.get(line, 0), f"$ {line}\n{ran.stdout}"
        if "scx-enroll csr" in line:
            site.sign(site.folder / "lin01.csr", site.folder / "lin01.p7b")
        if "openssl s_client" in line:
            assert "Lab Issuing CA" in ran.stdout


@pytest.mark.checkout
@pytest.mark.parametrize("page", ["README.md", "docs/packages.md", "packaging/README.md"])
def test_a_page_installs_another_version(checkout, page):
    """The files that the pages install are those that `make packages` builds from this checkout."""
    named = set(re.findall(r"\bscx-enroll[_-][0-9]\S*\.(?:deb|rpm)\b", text_of(checkout, page)))
    assert named == {f"scx-enroll_{scx_enroll.__version__}-1_all.deb", f"scx-enroll-{scx_enroll.__version__}-1.noarch.rpm"}


def paths_in(checkout, page, heading):
    """What the first column of a section's table names; a bare name lies beside the first of its row."""
    section = text_of(checkout, page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [re.findall("`(.+?)`", cell) for cell in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)]
    return [name if "/" in name else os.path.join(os.path.dirname(row[0]), name) for row in rows for name in row]


@pytest.mark.checkout
def test_a_file_of_the_packages_without_a_word(checkout):
    """docs/packages.md names every path of nfpm.yaml, or a folder with all that is in it; and none that is not there."""
    named = paths_in(checkout, "docs/packages.md", "What is in them")
    delivered = re.findall(r"dst: ([^\s,}]+)", text_of(checkout, "packaging/nfpm.yaml"))
    folders = tuple(name for name in named if name.endswith("/"))
    parents = tuple(path for path in delivered if any(name.startswith(path + "/") for name in named))
    assert [path for path in delivered if path not in (*named, *parents) and not f"{path}/".startswith(folders)] == []
    assert [name for name in named if not any(f"{path}/".startswith(name.rstrip("/") + "/") for path in delivered)] == []


@pytest.mark.checkout
def test_an_interpreter_of_the_rpm_without_a_word(checkout):
    """docs/packages.md names the libraries of each Python that the rpm can use."""
    table = text_of(checkout, "docs/packages.md").partition("\n## Which release can do what\n")[2].partition("\n## ")[0]
    libraries = re.findall(r"\bpython[0-9.]+-(?:cryptography|requests)\b", text_of(checkout, "packaging/nfpm.yaml"))
    assert len(set(libraries)) == 10
    assert [name for name in libraries if name not in table] == []


@pytest.mark.checkout
def test_a_file_of_packaging_without_a_word(checkout):
    """packaging/README.md names every file of packaging/ and systemd/, and no other."""
    files = set()
    for folder in ("packaging", "packaging/scripts", "packaging/examples", "systemd"):
        beneath = os.path.relpath(folder, "packaging")
        files |= {os.path.normpath(os.path.join(beneath, entry.name)) for entry in os.scandir(os.path.join(checkout, folder)) if entry.is_file()}
    named = paths_in(checkout, "packaging/README.md", "The files")
    assert sorted(named) == sorted(files - {"README.md"})


@pytest.mark.checkout
def test_an_example_goes_elsewhere(checkout):
    """Every example is used or named by a page, and copied to where it says itself."""
    text = text_of(checkout, "docs/packages.md")
    copied = dict(re.findall(r"^install .*/usr/share/doc/scx-enroll/examples/(\S+) (\S+)$", text, re.MULTILINE))
    for name in os.listdir(os.path.join(checkout, "packaging", "examples")):
        meant = re.search(r"[Cc]opy to (/\S+?),? ", text_of(checkout, f"packaging/examples/{name}").replace("\n# ", " "))[1]
        assert copied.pop(name, None) == meant or name == "scx-enroll.sudoers"
    assert copied == {}


@pytest.mark.checkout
def test_the_readme_shows_another_help(checkout):
    """The README shows what --help prints."""
    assert arguments.HELP in blocks(checkout, "README.md", "text")


@pytest.mark.slow
def test_help_does_not_print_the_help():
    """--help prints the text that the README shows, and the version is the package's."""
    ran = subprocess.run((PROGRAM, "--help"), capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == (arguments.HELP, "")
    ran = subprocess.run((PROGRAM, "--version"), capture_output=True, text=True, check=True)
    assert ran.stdout == f"scx-enroll {scx_enroll.__version__}\n"


# -- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.checkout
def test_the_configuration_of_the_readme_is_refused(checkout, tmp_path):
    """It loads, and means what it says."""
    folder = tmp_path / "etc" / "scx-enroll"
    folder.mkdir(parents=True)
    (folder / "scx-enroll.conf").write_text(blocks(checkout, "README.md", "ini")[0], encoding="utf-8")
    (folder / "scx-enroll.conf").chmod(0o644)
    got = config.load(Root(str(tmp_path)))
    assert got.host == config.Host(name="lin01.corp.example")
    assert got.cas == (config.CA(server="ca01.corp.example", template="SCXAgent"),)


@pytest.mark.checkout
@pytest.mark.parametrize("page", PAGES)
def test_a_key_of_the_pages_does_not_exist(checkout, page):
    """Every `key =` that a page names is a key of the configuration."""
    known = {key for keys in config._KEYS.values() for key in keys}
    named = re.findall(r"`([a-z]+(?:-[a-z]+)*) =", text_of(checkout, page))
    named += [line.partition(" =")[0] for block in blocks(checkout, page, "ini") for line in block.splitlines() if " = " in line]
    assert set(named) <= known


@pytest.mark.checkout
def test_a_limit_of_the_readme_is_not_the_programs(checkout):
    """The budgets and defaults that the README states are those of the code."""
    from scx_enroll.journal import RESTARTS_PER_DAY, RESTARTS_PER_HOUR

    text = " ".join(text_of(checkout, "README.md").split())
    defaults = config.Renewal()
    assert f"{defaults.certificates_per_day} certificates and {defaults.submissions_per_day} submissions a day" in text
    assert f"{RESTARTS_PER_HOUR} times an hour and {RESTARTS_PER_DAY} times a day" in text
    assert str(defaults.at) == "2/3"
    assert config.Agent().settle_s == 120


# -- the messages ---------------------------------------------------------------------------------------------------


def _switched(**values):
    return lambda site: site.ca.switches.update(values)


def _unpublished(site):
    site.ca.authority.templates["SCXAgent"].published = False


def _unsettled(site):
    site.write("conf.d/lab.conf", f"[agent]\nport = {site.host.port}\n[ca]\nauth = basic\nuser = {USER}\n")


def _one_file(site):
    key = site.host.path(site.host.key)
    with open(key, "rb") as one, open(site.host.resolve(site.host.certificate), "ab") as other:
        other.write(one.read())
    os.unlink(key)
    os.symlink(site.host.certificate, key)


def _unjoined(site):
    site.write("conf.d/lab.conf", f"[agent]\nport = {site.host.port}\nsettle = 0s\n")


# The beginning of a message in the README's table, and what brings it about.
def _tonight():
    """A range of the day that begins in six hours."""
    return "-".join(time.strftime("%H:%M", time.localtime(time.time() + hours * 3600)) for hours in (6, 7))


TOUCHING = ("the agent does not answer", "generation 0123456789abcdef is")  # these change what is served before the run
CAUSES = {
    "/etc/scx-enroll/scx-enroll.conf:4: unknown key": lambda site: (
        site.write("scx-enroll.conf", "[ca]\nserver = a.corp.example\ntemplate = T\nsever = b.corp.example\nauth = basic\nuser = u\n")
    ),
    "/etc/scx-enroll/scx-enroll.conf:7: user is for": lambda site: (
        _unjoined(site) or site.change("template = SCXAgent\n", f"template = SCXAgent\nuser = {USER}\n")
    ),
    "/etc/scx-enroll/scx-enroll.conf:2: name": lambda site: site.change("lin01.corp.example", "lin01"),
    "/etc/scx-enroll/password is open": lambda site: (site.etc / "password").chmod(0o644),
    "the CA certificate of": lambda site: shutil.copy(site.ca.server_trust, site.etc / "ca.pem"),
    "no agent was found": lambda site: os.unlink(site.host.path("/opt/omi/bin/omiserver")),
    "/etc/opt/omi/conf/omiserver.conf": lambda site: site.host.make_file(site.host.conf, "httpsport=0\n"),
    "the agent reads its key through": _one_file,
    "the agent's files changed": _unsettled,
    "the agent does not answer": lambda site: site.host.kill(),
    "this host is sealed": lambda site: site.run("seal"),
    "ca01.corp.example refused the connection": lambda site: site.ca.stop(),
    "the TLS certificate of": _switched(https="unknown-ca"),
    "ca01.corp.example has no /certsrv": _switched(answer="404"),
    "ca01.corp.example: the web server can't reach": _switched(unavailable="all"),
    "it is doubtful": _switched(lost="after"),
    "ca01.corp.example refused request ID 4711: the template": _unpublished,
    "ca01.corp.example refused request ID 4711: the account": _switched(mode="deny"),
    "request ID 4711 at": _switched(mode="pending"),
    "certificate of request ID 4711": _switched(names_from_ad="svc-scx-enroll.corp.example"),
    "generation 0123456789abcdef is": lambda site: (
        site.host.scom_sign(), site.write("conf.d/window.conf", f"[agent]\nrestart-window = {_tonight()}\n")
    ),
    "generation 0123456789abcdef was": lambda site: site.host.refuse_new(),
    "this host's clock": _switched(date_offset=4000.0),
    "there is no keytab": _unjoined,
    "ca01.corp.example refused user": lambda site: site.write("password", "wrong\n", 0o600),
}


def table(checkout):
    text = text_of(checkout, "README.md").partition("\n## Troubleshooting\n")[2].partition("\n## ")[0]
    return [(message, int(status)) for message, status in re.findall(r"^\| `(.+?)` \| ([0-9]+) \|", text, re.MULTILINE)]


@pytest.mark.checkout
def test_a_message_of_the_readme_that_no_test_brings_about(checkout):
    """Each row of the table has its cause above, and each cause its row; the last row is that of the sandbox."""
    *rows, sandbox = [message for message, _ in table(checkout)]
    assert [[start for start in CAUSES if message.startswith(start)] for message in rows] == [[start] for start in CAUSES]
    assert sandbox.startswith("can't write ")


@pytest.mark.checkout
def test_a_cause_that_operators_can_not_look_up(checkout):
    """The README says of each word that a log may show what it means and what is done."""
    part = text_of(checkout, "README.md").partition("\n## When others change the agent's files\n")[2].partition("\n## ")[0]
    told = [cause for cell in re.findall(r"^\| (`.+?) \|", part, re.MULTILINE) for cause in re.findall("`(.+?)`", cell)]
    assert sorted(told) == sorted(journal.CAUSES)


@pytest.mark.checkout
def test_the_cure_for_the_sandbox_is_not_what_the_program_says(checkout):
    """A folder that only the service can't write: the row has the message and the status, and what the hint says is in the pages."""
    message, status = table(checkout)[-1]
    path = re.fullmatch("can't write (/.+): .+", message)[1]
    with pytest.raises(HostError) as said, durable.explained(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert (said.value.message, said.value.exit_status) == (message, status)
    opened = f"ReadWritePaths={os.path.dirname(path)}"
    assert said.value.hint.endswith(f"with the lines [Service] and {opened}")
    assert f"[Service]\n{opened}\n" in text_of(checkout, "packaging/examples/drop-in-moved-files.conf")


@pytest.mark.slow
@pytest.mark.parametrize("start", CAUSES)
def test_a_message_of_the_readme_is_not_what_the_program_says(checkout, site, start):
    """The program says it word for word (but for numbers), with that exit status; and the agent serves what it served before."""
    (message, status), = (row for row in table(checkout) if row[0].startswith(start))
    was = site.host.served()
    CAUSES[start](site)
    before = site.host.served()
    assert (before == was) == (not start.startswith(TOUCHING)), "the cause itself leaves the agent as it was"
    assert (before is None) == start.startswith("the agent does not answer")
    ended, shown = site.run("run")
    pattern = re.sub(r"(?<![\w.])[0-9a-f]{16}\b", "[0-9a-f]{16}", re.escape(message))
    pattern = re.sub(r"\b(?<!0x)[0-9]+\\? s\\? ", r"[0-9]+ s ", pattern).replace("…", ".+").replace("\\ ", " ")
    assert re.search(rf"^(?:scx-enroll: (?:error|waiting): )?{pattern}$", shown, re.MULTILINE), shown
    assert ended == status
    assert re.search("^scx-enroll: hint: .", shown, re.MULTILINE), shown
    assert site.host.served() == before


# -- the JSON document ----------------------------------------------------------------------------------------------


def keys_of(value, prefix=""):
    """Every key of a document, as docs/status.md writes it: `a`, `a.b`, `a[].b`."""
    found = set()
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= {prefix + key} | keys_of(inner, f"{prefix}{key}.")
    elif isinstance(value, list):
        for inner in value:
            found |= keys_of(inner, f"{prefix[:-1]}[].")
    return found


@pytest.mark.slow
def test_a_key_of_the_document_is_not_documented(checkout, site):
    """docs/status.md lists every key that real documents have, and no other."""
    text = text_of(checkout, "docs/status.md")
    parts = re.split("\nA run that ended with an error|\n## The document of submit", text)
    documented, short, submitted = (set(re.findall(r"^\| `(.+?)` \|", part, re.MULTILINE)) for part in parts)
    found = set()

    def look(*arguments):
        status, shown = site.run(*arguments, "--json")
        found.update(keys_of(json.loads(shown)))
        return status

    assert look("status") == 0
    site.ca.switches.mode = "pending"
    assert look("run") == 7
    site.ca.authority.approve(4711)
    assert look("run", "--now") == 0
    site.host.move_link_back()
    assert look("run", "--now") == 0
    site.ca.switches.mode = "deny"
    assert look("run", "--renew") == 6
    foreign = site.folder / "aix01.csr"
    foreign.write_bytes(request.build_csr(request.RequestSpec("aix01.corp.example"), ec.generate_private_key(ec.SECP256R1())))
    site.ca.switches.mode = "pending"
    status, waits = site.run("submit", str(foreign), "--json", "--now", "--renew")
    assert look("status") == 0
    assert found == documented
    published = Path(site.host.root, "run/scx-enroll/status.json")
    assert published.stat().st_mode & 0o777 == 0o644
    assert keys_of(json.loads(published.read_text(encoding="utf-8"))) <= documented
    site.ca.authority.approve(max(site.ca.authority.rows))
    status, done = site.run("submit", str(foreign), "--json", "--now")
    documents = [json.JSONDecoder().raw_decode(shown[shown.index("{"):])[0] for shown in (waits, done)]
    assert keys_of(documents[0]) | keys_of(documents[1]) == submitted
    (site.etc / "scx-enroll.conf").chmod(0o666)
    status, shown = site.run("run", "--json")
    assert status == 12
    assert keys_of(json.loads(shown.partition("scx-enroll: ")[0])) == short


# -- links ----------------------------------------------------------------------------------------------------------


def anchors(text):
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.checkout
@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_nowhere(checkout, page):
    """Every link of a page leads to a file of the checkout, and to a heading of it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(checkout, page)):
        assert "://" not in target
        name, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), name)) if name else page
        assert os.path.exists(os.path.join(checkout, path)), target
        if anchor:
            assert anchor in anchors(text_of(checkout, path)), target


@pytest.mark.checkout
def test_a_page_that_no_test_reads(checkout):
    """PAGES lists every page for operators."""
    found = {"README.md", "CHANGELOG.md"}
    for folder in ("docs", "packaging"):
        found |= {f"{folder}/{name}" for name in os.listdir(os.path.join(checkout, folder)) if name.endswith(".md")}
    assert found == set(PAGES)


@pytest.mark.checkout
def test_a_command_of_the_sign_in_page_that_the_readme_does_not_run(checkout):
    """The README's commands are run on one host, in their order; that page shows no others."""
    run = "".join(blocks(checkout, "README.md", "sh")).splitlines()
    assert [line for block in blocks(checkout, "docs/sign-in.md", "sh") for line in block.splitlines() if line not in run] == []


@pytest.mark.checkout
def test_a_failure_of_kerberos_without_a_row_in_the_page(checkout):
    """docs/sign-in.md has every message that a failure of Kerberos can end with, in its words."""
    from scx_enroll import kerberos

    named = {
        "server": "ca01.corp.example", "account": "LIN01$@CORP.EXAMPLE", "realm": "CORP.EXAMPLE", "kvno": 3, "keytab": "/etc/krb5.keytab",
        "spn": "HTTP/ca01.corp.example", "asked": "", "canonical": "", "text": "…",
    }  # fmt: skip
    tables = (*kerberos._FAILURES.values(), *kerberos._BY_THE_SERVER.values(), kerberos._UNPROVEN)
    messages = {what.format(**named) for _, what, _ in tables}
    text = text_of(checkout, "docs/sign-in.md").partition("\n## When it fails\n")[2].replace("HTTP/pki.corp.example", "HTTP/ca01.corp.example")
    rows = [row.partition("…")[0].rstrip("; ") for row in re.findall(r"^\| `(.+?)`", text, re.MULTILINE)]
    assert [message for message in messages if not any(message.startswith(row) for row in rows)] == []
