"""The lab's package scripts keep to the facts: what each row of the table of other owners says stands afterwards."""

import os
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization

from tests.lab import packagescripts as scripts
from tests.lab import selfsigned
from tests.lab.agent import LabHost
from tests.lab.packagescripts import MARKER, OMI_CONF, OMI_KEY, OMI_PEM, OMI_SSL, SCRIPTS, SCX_KEY, SCX_PEM, SCX_SSL

pytestmark = pytest.mark.lab

EC = "ec:secp256r1"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes owners")


@pytest.fixture
def host(tmp_path):
    with LabHost(tmp_path / "host", key=EC) as host:
        yield host


def text(host, path):
    """What a link says, "" for no link."""
    real = host.path(path)
    return os.readlink(real) if os.path.islink(real) else ""


def there(host, path):
    return os.path.lexists(host.path(path))


def names(host, folder=OMI_SSL):
    return sorted(os.listdir(host.path(folder)))


def mode(host, path):
    return os.stat(host.resolve(path)).st_mode & 0o7777


def fits(host):
    """Whether the two files that the packages look after are a pair."""
    certificate, key = host.read(OMI_PEM), host.read(OMI_KEY)
    done = subprocess.run(["openssl", "x509", "-noout", "-pubkey"], input=certificate, stdout=subprocess.PIPE, check=True)
    public = serialization.load_pem_private_key(key, None).public_key()
    return done.stdout == public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def given(host, *options):
    """Give the host a pair that openssl makes."""
    key, certificate = host.path("/tmp/key"), host.path("/tmp/cert")
    fresh = () if "-key" in options else ("-keyout", key)
    words = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=host1", *options, *fresh, "-out", certificate]
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    with open(certificate, "rb") as cert_file, open(key, "rb") as key_file:
        host.install(cert_file.read(), key_file.read())
    return key


# omi


def test_a_sound_pair_survives_an_omi_upgrade(tmp_path):
    """A restart, and nothing else: most upgrades."""
    with LabHost(tmp_path, key="rsa:3072") as host:
        host.start()
        before, pid = host.snapshot(), host.pid
        assert scripts.omi_install(host) == 0
        assert host.snapshot() == before
        assert host.pid not in (0, pid)


@pytest.mark.parametrize(
    ("options", "version", "thrown_away"),
    [
        (["-newkey", "rsa:2048"], "1.9.1", True),
        (["-newkey", "rsa:2048"], "1.8.1", False),
        (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-521"], "1.9.1", True),
        (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384"], "1.9.1", True),
        (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "1.9.0", True),
        (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "1.8.9", False),
        (["-newkey", "ed25519"], "1.9.1", False),  # 25519 is more than 3072
    ],
)
def test_omi_distrusts_by_the_digits_that_openssl_prints(host, options, version, thrown_away):
    """An EC key is strong and thrown away all the same; versions differ."""
    given(host, *options)
    assert scripts.is_distrusted(host, version) is thrown_away


def test_omi_distrusts_sha1_whatever_the_key(host):
    """From 1.6.9 on; a key of 3072 bits alone is fine."""
    key = given(host, "-newkey", "rsa:3072")
    assert not scripts.is_distrusted(host)
    given(host, "-key", key, "-sha1")
    assert [scripts.is_distrusted(host, version) for version in ("1.6.8", "1.6.9", "1.9.1")] == [False, True, True]


def test_what_openssl_cannot_read_is_kept(host):
    """The script's comparison fails then, and it goes on."""
    host.install(b"junk")
    assert not scripts.is_distrusted(host)


def test_a_distrusted_pair_is_deleted_with_all_that_stands_beside_it(host):
    """Links, folders and whatever else is in the folder; names with a dot stay, and what links lead to."""
    host.make_file(f"{OMI_SSL}/.kept", "x")
    host.make_file(f"{OMI_SSL}/pair-1/key.pem", "x")
    host.make_file("/etc/elsewhere/file", "x")
    os.symlink("/etc/elsewhere", host.path(f"{OMI_SSL}/folder-link"))
    steps = []
    assert scripts.omi_install(host, kind=EC, restart=False, between=steps.append) == 0
    assert names(host) == [".kept", ".omi_cert_marker", "omi.pem", "omikey.pem", "ssl.cnf"]
    assert (text(host, OMI_PEM), mode(host, OMI_PEM), mode(host, OMI_KEY)) == ("", 0o644, 0o600)
    assert fits(host)
    assert there(host, "/etc/elsewhere/file")
    assert steps.index("ssl/* is deleted") < steps.index("the key is written") < steps.index("the certificate is written")
    assert steps[-2:] == ["the marker is made", "the key has its owner"]


@pytest.mark.parametrize("lost", ["key", "certificate", "target"])
def test_half_a_pair_is_overwritten_through_the_links(host, lost):
    """A name that dangles for an instant costs the key; what links lead to is overwritten, whoever it belongs to."""
    host.make_file("/etc/ours/key.pem", host.read(OMI_KEY), 0o640)
    host.make_file("/etc/ours/cert.pem", host.read(OMI_PEM), 0o444)
    for path, target in ((OMI_KEY, "/etc/ours/key.pem"), (OMI_PEM, "/etc/ours/cert.pem")):
        os.unlink(host.path(path))
        os.symlink(target, host.path(path))
    os.unlink(host.path({"key": "/etc/ours/key.pem", "certificate": OMI_PEM, "target": "/etc/ours/cert.pem"}[lost]))
    before = host.read("/etc/ours/key.pem") if lost != "key" else b""
    assert scripts.omi_install(host, kind=EC, restart=False) == 0
    assert text(host, OMI_KEY) == "/etc/ours/key.pem"
    assert text(host, OMI_PEM) == ("" if lost == "certificate" else "/etc/ours/cert.pem")
    assert host.read("/etc/ours/key.pem") != before
    assert (mode(host, OMI_KEY), mode(host, OMI_PEM)) == (0o600, 0o644)
    assert there(host, MARKER)
    assert fits(host)


def test_a_link_into_a_folder_that_is_gone_ends_the_script(host):
    """The key is overwritten by then: a pair that does not fit, and a package that is half installed."""
    host.relink("/etc/gone/cert.pem")
    key = host.read(OMI_KEY)
    assert scripts.omi_install(host, kind=EC, restart=False) == 1
    assert host.read(OMI_KEY) != key
    assert not there(host, MARKER)


@root_only
def test_an_omi_install_takes_the_key_through_its_link_and_keeps_its_mode(host):
    """Always, also where the pair stays: whatever the name leads to belongs to the agent's account then."""
    host.make_file("/etc/ours/key.pem", host.read(OMI_KEY), 0o640)
    os.unlink(host.path(OMI_KEY))
    os.symlink("/etc/ours/key.pem", host.path(OMI_KEY))
    scripts.omi_install(host, version="1.8.1", restart=False)
    state = os.lstat(host.path("/etc/ours/key.pem"))
    assert ((state.st_uid, state.st_gid), state.st_mode & 0o7777) == (host.account, 0o640)
    assert os.lstat(host.path(OMI_KEY)).st_uid == 0


@root_only
def test_omi_that_comes_back_may_have_another_uid(host):
    """Older copies of the key keep the old one, which another account may get."""
    host.start()
    old = host.account
    host.make_file(f"{OMI_SSL}/older-key.pem", host.read(OMI_KEY), 0o400, old)
    before = host.snapshot()
    scripts.omi_remove(host)
    assert host.pid == 0
    assert (there(host, "/opt/omi/bin/omiserver"), there(host, OMI_CONF)) == (False, True)
    assert host.snapshot() == before
    scripts.omi_install(host, version="1.8.1", uid=4711)
    assert host.account == (4711, 4711) != old
    after = host.snapshot()
    assert {path for path in after if after[path] != before[path]} == {OMI_KEY}
    assert (after[OMI_KEY].data, after[OMI_KEY].mode, after[OMI_KEY].uid) == (before[OMI_KEY].data, 0o400, 4711)
    assert host.served() == host.leaf()


def test_a_replaced_conf_keeps_the_ports_and_loses_the_pair(tmp_path):
    """An rpm's: what the administrator set is in .rpmsave, and the package's own pair is served."""
    with LabHost(tmp_path, "omi-apart", key=EC) as host:
        host.start()
        moved = host.served()
        scripts.omi_install(host, version="1.8.1", conf_replaced=True)
        assert there(host, f"{OMI_CONF}.rpmsave")
        assert (host.certificate, host.key, mode(host, OMI_CONF)) == (OMI_PEM, OMI_KEY, 0o644)
        assert host.served() == host.leaf() != moved


# scx


def test_with_the_marker_scx_makes_a_pair_of_its_own(tmp_path):
    """What OMI made is for scx to replace; that is why no marker may stay beside a CA's certificate."""
    with LabHost(tmp_path, "omi-regular", key=EC) as host:
        host.start()
        key, steps = host.read(OMI_KEY), []
        assert scripts.scx_install(host, between=steps.append) == 0
        assert names(host) == ["omi-host-host1.pem", "omi.pem", "omikey.pem"]
        assert text(host, OMI_PEM) == f"{OMI_SSL}/omi-host-host1.pem"
        assert (text(host, SCX_PEM), text(host, f"{SCX_PEM}_backup")) == (OMI_PEM, OMI_PEM)
        assert host.read(OMI_KEY) != key
        assert host.served() == host.leaf()
        assert steps.index("omikey.pem is moved aside") < steps.index("omi.pem is moved aside") < steps.index("the key is written")
        assert steps.index("the marker is removed") < steps.index("what was aside is removed")


def test_links_are_moved_aside_as_links(host):
    """Then a new pair is made, and what they led to stays where it is, of no use to anybody."""
    host.make_file(MARKER, "")
    host.make_file(f"{OMI_SSL}/pair-1/key.pem", host.read(OMI_KEY), 0o400, host.account)
    os.unlink(host.path(OMI_KEY))
    os.symlink("pair-1/key.pem", host.path(OMI_KEY))
    kept = host.read(f"{OMI_SSL}/pair-1/key.pem")
    scripts.scx_install(host, restart=False)
    assert text(host, OMI_KEY) == ""
    assert host.read(f"{OMI_SSL}/pair-1/key.pem") == kept
    assert fits(host)


def test_a_pair_that_scx_cannot_make_leaves_the_agent_without_one(tmp_path):
    """The names stay aside: a running agent goes on, and its next start is its end."""
    with LabHost(tmp_path, "omi-regular", key=EC) as host:
        host.start()
        pair = host.read(OMI_PEM), host.read(OMI_KEY)
        assert scripts.scx_install(host, fails=True) == 1
        assert names(host) == [".omi_cert_marker", "omi.pem_temp", "omikey.pem_temp"]
        assert (host.read(f"{OMI_PEM}_temp"), host.read(f"{OMI_KEY}_temp")) == pair
        assert host.served()
        assert not host.would_start()
        assert not host.restart()


@pytest.mark.parametrize("dpkg", [False, True])
def test_without_the_marker_scx_keeps_the_pair(host, dpkg):
    """And makes its own link anew; dpkg runs the removal script of the old package first, so it keeps no backup."""
    host.start()
    before, pid = host.snapshot(), host.pid
    assert scripts.scx_install(host, dpkg=dpkg) == 0
    after = host.snapshot()
    assert there(host, f"{SCX_PEM}_backup") is not dpkg
    assert {path for path in {*after, *before} if path.startswith(OMI_SSL) and after.get(path) != before.get(path)} == set()
    assert text(host, SCX_PEM) == OMI_PEM
    assert host.pid not in (0, pid)
    assert host.served() == host.leaf()


def test_a_dangling_certificate_stops_an_rpm_and_kills_under_dpkg(tmp_path):
    """One says so, the other says 0: neither leaves an agent that starts."""
    with LabHost(tmp_path, "omi-dangling", key=EC) as host:
        before = host.snapshot()
        assert scripts.scx_install(host) == 1
        assert host.snapshot() == before
        assert scripts.scx_install(host, dpkg=True) == 0
        assert text(host, SCX_PEM) == OMI_PEM
        assert host.served() is None


@pytest.mark.parametrize("layout", ["classic-omi", "pegasus"])
def test_a_classic_agent_becomes_omi_and_keeps_its_pair(tmp_path, layout):
    """The link is moved, not what it leads to: the host pem stays in the classic folder."""
    with LabHost(tmp_path / "old", layout, key=EC) as host, LabHost(tmp_path / "new", "omi-migrated", key=EC) as made:
        host.start()
        key, served = host.read(host.key), host.served()
        assert scripts.bundle_upgrade(host, kind=EC) == 0
        assert host.is_omi
        assert (host.read(OMI_KEY), host.served()) == (key, served)
        shape = [
            {path: (entry.kind, entry.text, entry.mode, entry.uid) for path, entry in one.snapshot().items() if not path.endswith("ssl.cnf")}
            for one in (host, made)
        ]
        assert shape[0] == shape[1]
        assert not there(host, "/opt/microsoft/scx/bin/omiserver")


def test_the_oldest_pair_ends_dangling(tmp_path):
    """The script links to a folder where the file is not: the agent can't start, and the key is sound."""
    with LabHost(tmp_path / "old", "classic-omi", key=EC) as host, LabHost(tmp_path / "new", "omi-dangling", key=EC) as made:
        for path, name in ((SCX_KEY, "scx-seclevel1-key.pem"), (f"{SCX_SSL}/scx-host-host1.pem", "scx-seclevel1.pem")):
            os.rename(host.path(path), host.path(f"{SCX_SSL}/{name}"))
        os.unlink(host.path(SCX_PEM))
        assert scripts.bundle_upgrade(host, kind=EC) == 0
        assert text(host, OMI_PEM) == text(made, OMI_PEM)
        assert not os.path.exists(host.resolve(OMI_PEM))
        assert there(host, f"{OMI_SSL}/omi-host-host1.pem")
        assert host.served() is None


def test_scx_takes_its_port_away_with_it(host):
    """OMI stays, and SCOM does not reach it: a fault of configuration, none of the certificate."""
    host.start()
    before = host.snapshot()
    assert scripts.scx_remove(host) == 0
    after = host.snapshot()
    assert {path for path in {*before, *after} if before.get(path) != after.get(path)} == {SCX_PEM}
    assert not there(host, host.scxadmin)
    assert host.served() is None
    assert host.pid
    assert scripts.scx_install(host) == 0
    assert host.served() == host.leaf()


def test_a_purge_leaves_nothing_and_a_fresh_install_works(host):
    """Its pair is scx's own, the link beside its target."""
    host.start()
    assert scripts.purge(host) == 0
    assert host.pid == 0
    assert not any(there(host, path) for path in ("/etc/opt/omi", "/etc/opt/microsoft/scx", "/opt/omi", "/opt/microsoft/scx"))
    assert scripts.fresh_install(host, kind=EC) == 0
    assert names(host) == ["omi-host-host1.pem", "omi.pem", "omikey.pem", "ssl.cnf"]
    assert mode(host, OMI_KEY) == 0o400
    assert host.served() == host.leaf()


def test_a_bundle_that_starts_again_leaves_the_pair_it_found(host):
    """Both are removed and installed: no marker, so OMI's pair is nobody's to replace."""
    scripts.omi_install(host, kind="rsa:3072", restart=False)
    scripts.scx_install(host, restart=False)
    host.knobs(new_key="rsa:3072")
    scripts.scxsslconfig(host, "-f")
    before = host.snapshot()
    assert scripts.bundle_reinstall(host) == 0
    after = host.snapshot()
    assert {path for path in {*before, *after} if path.startswith(OMI_SSL) and before.get(path) != after.get(path)} == set()
    assert host.served() == host.leaf()


# tools


def test_scxsslconfig_works_in_place_and_through_links(host):
    """Who keeps a key behind the name loses it; a certificate's link is made anew."""
    host.make_file("/etc/ours/key.pem", host.read(OMI_KEY), 0o440)
    os.unlink(host.path(OMI_KEY))
    os.symlink("/etc/ours/key.pem", host.path(OMI_KEY))
    host.make_file("/etc/ours/cert.pem", host.read(OMI_PEM))
    host.relink("/etc/ours/cert.pem")
    ours, old, steps = host.read("/etc/ours/cert.pem"), host.read(OMI_KEY), []
    assert scripts.scxsslconfig(host, between=steps.append) == 0
    assert (steps, host.read(OMI_KEY)) == ([], old)
    assert scripts.scxsslconfig(host, "-f", between=steps.append) == 0
    assert steps == [
        "the key is written", "the key has its owner", "the host pem is written", "the certificate's name is removed",
        "the certificate's name is a link",
    ]
    assert text(host, OMI_KEY) == "/etc/ours/key.pem"
    assert (host.read("/etc/ours/key.pem") != old, mode(host, OMI_KEY)) == (True, 0o400)
    assert (text(host, OMI_PEM), host.read("/etc/ours/cert.pem")) == (host.host_pem, ours)
    assert fits(host)
    before = host.snapshot()
    assert SCRIPTS["scxsslconfig -f, failing"](host) != 0
    assert host.snapshot() == before


def test_a_signature_comes_when_it_comes(host):
    """SCOM fetches, signs and copies later: what stands there by then is overwritten through the links."""
    host.start()
    found = scripts.scom_discover(host)
    host.make_file(f"{OMI_SSL}/ours.pem", host.read(OMI_PEM))
    host.relink("ours.pem")
    der = scripts.scom_sign(host, found=found)
    assert host.read(f"{OMI_SSL}/ours.pem") == selfsigned.armour(der)
    assert host.served() == der
    scripts.scxsslconfig(host, "-f")
    assert host.restart()
    scripts.scom_sign(host, found=found)
    assert host.served() is None


def test_scom_copies_nothing_through_a_link_that_leads_nowhere(host):
    """Neither does it find anything to sign."""
    os.unlink(host.path(SCX_PEM))
    os.symlink("/etc/nowhere.pem", host.path(SCX_PEM))
    assert scripts.scom_sign(host) is None
    before = host.snapshot()
    SCRIPTS["scom sign, old key"](host)
    assert host.snapshot() == before


@root_only
def test_omsagents_links_take_the_key_from_the_agent(host):
    """Its account owns what the link leads to: the agent can't read its key any more."""
    host.start()
    assert scripts.omsagent_install(host) == 0
    assert host.would_start()
    assert scripts.omsagent_install(host, linked=True) == 0
    assert not host.would_start()
    assert os.stat(host.path(OMI_KEY)).st_uid == scripts.OMSAGENT_ACCOUNT[0]
    assert not host.restart()


# all of them


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_leaves_the_same_each_time_and_starts_nothing(tmp_path, script):
    """A test that runs something between any two steps of each has to know where it stands."""
    shapes, steps = [], []
    for name in ("one", "two"):
        with LabHost(tmp_path / name, key=EC) as host:
            steps.append([])
            SCRIPTS[script](host, between=steps[-1].append)
            shapes.append({path: (entry.kind, entry.text, entry.mode, entry.uid) for path, entry in host.snapshot().items()})
            assert (host.starts, host.pid, host.restarts) == (0, 0, 0)
    assert shapes[0] == shapes[1]
    assert steps[0] == steps[1]
    assert len(steps[0]) > 1 or script in ("scxsslconfig", "scxsslconfig -f, failing")
