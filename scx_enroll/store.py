"""The only writer of the state directory: durable files, the lock, generations. `beside` writes in the agent's folders.

docs/state.md lists every file and every change; each change is one method here. A change is durable when its method
returns, or it did not happen. The agent's folders may be writable by its less privileged account, so names in them are
never followed.
"""

import fcntl
import os
import re
import secrets
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterator, Optional, Set, Tuple

from scx_enroll import journal as j
from scx_enroll.beside import Beside
from scx_enroll.durable import TEMPORARY, clear, explained, move, move_tree, remove_tree, write
from scx_enroll.errors import Busy, HostError
from scx_enroll.idle import PREMISES, STATE, STATUS_FOLDER, STATUS_NAME
from scx_enroll.rootfs import Root

STATUS = f"{STATUS_FOLDER}/{STATUS_NAME}"
_KEPT = re.compile(r"[0-9a-f]{64}\.pem|[0-9]+\.html")  # what stands in original/ and pages/
MAX_STATE_BYTES = 1 << 20  # a journal is some kB; chains and saved certificates are smaller still
_KEY = re.compile(r"([0-9a-f]{64})(\.old)?\.pem")  # in keys/: it waits for its certificate; or makes room for another
KEPT_GENERATIONS = 8
KEPT_ORIGINALS = 8
KEPT_PAGES = 5
KEPT_ERRANDS = 1000  # some kB each; a certificate of an older one is asked for anew
LOCK_POLL_S = 0.2
_KEYS = "keys"  # those that wait for their certificates
_ONES_OWN = ("generations", "original", "pages", "submitted")  # folders that mean nothing to another machine

@dataclass(frozen=True)
class Generation:
    """A certificate obtained: its id, PEM of leaf and chain, and where it came from."""

    id: str
    certificate: bytes
    chain: bytes
    origin: j.Origin


class Store:
    """The state of one root, and the changes that may be made to it.

    `journal` and `budget` are as last saved. Nothing is created before `lock` was entered.
    """

    def __init__(self, root: Root) -> None:
        self.root = root
        self.beside = Beside(root)
        self.sub = ""  # where journal and generations stand, beneath STATE
        self.journal = j.Journal()
        self.budget = j.Budget()

    @property
    def path(self) -> str:
        """Where journal and generations stand."""
        return f"{STATE}/{self.sub}".rstrip("/")

    # -- reading ------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Read journal and budget; absent ones are empty. Raises HostError for what is not understood."""
        self.journal = self._load(j.Journal, f"{self.path}/journal.json")
        self.budget = self._load(j.Budget, f"{STATE}/budget.json")

    def _load(self, kind: "type[j.T]", path: str) -> j.T:
        try:
            return j.from_json(kind, self.root.read(path, MAX_STATE_BYTES, trusted=True), path)
        except FileNotFoundError:
            return kind()

    def generations(self) -> Tuple[Generation, ...]:
        """Every complete generation, oldest first."""
        found = []
        for name in self.root.listdir(f"{self.path}/generations"):
            if re.fullmatch("[0-9a-f]{16}", name):
                folder = f"{self.path}/generations/{name}"
                with suppress(FileNotFoundError):
                    certificate = self.root.read(f"{folder}/cert.pem", MAX_STATE_BYTES, trusted=True)
                    chain = self.root.read(f"{folder}/chain.pem", MAX_STATE_BYTES, trusted=True)
                    meta = self.root.read(f"{folder}/meta.json", MAX_STATE_BYTES, trusted=True)
                    origin = j.from_json(j.Origin, meta, f"{folder}/meta.json")
                    found.append(Generation(name, certificate, chain, origin))
        return tuple(sorted(found, key=lambda g: (g.origin.number, g.id)))

    def original(self, name: str) -> bytes:
        """Return bytes that `save_original` kept."""
        return self.root.read(f"{STATE}/original/{name}", MAX_STATE_BYTES, trusted=True)

    def staged(self) -> Tuple[str, ...]:
        """The SPKI hashes of the keys that wait for their certificates."""
        found = map(_KEY.fullmatch, self.root.listdir(f"{STATE}/keys"))
        return tuple(shape[1] for shape in found if shape and not shape[2])

    def kept_keys(self) -> Set[str]:
        """What `drop_keys` may remove: the SPKI hashes of the keys that wait, and the names of old ones."""
        found = map(_KEY.fullmatch, self.root.listdir(f"{STATE}/keys"))
        return {shape[0] if shape[2] else shape[1] for shape in found if shape}

    @staticmethod
    def key_path(spki: str, *, old: bool = False) -> str:
        """Return where a key stands, beneath the root; `old`: the agent's, while another takes its place."""
        return f"{STATE}/keys/{spki}{'.old' if old else ''}.pem"

    def key(self, spki: str, *, old: bool = False) -> bytes:
        """Return a key (PEM) that `save_key` kept. Raises FileNotFoundError, HostError."""
        return self.root.read(self.key_path(spki, old=old), MAX_STATE_BYTES, private=True)

    # -- the lock -----------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, wait_s: float, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock; load the state. Raises Busy, naming the holder, when it isn't free within `wait_s`.

        The descriptor is not inherited by what is started meanwhile, so an agent can't hold it.
        """
        with explained(f"{STATE}/lock"), self._folder("", create=True) as folder:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open("lock", flags, 0o600, dir_fd=folder)
        try:
            deadline = time.monotonic() + wait_s
            while not self._try_lock(fd):
                holder = os.pread(fd, 200, 0).decode("ascii", "replace").strip() or "unknown"
                if time.monotonic() >= deadline:
                    raise Busy(
                        f"another run holds the lock: {holder}",
                        "wait for it to end, or give --wait SECONDS to wait here",
                    )
                waiting(f"waiting for the lock, held by {holder}")
                time.sleep(LOCK_POLL_S)
            with explained(f"{STATE}/lock"):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()}\n".encode(), 0)
            self.root.entry(f"{STATE}/lock")  # noted: its time is that of the run which held it last
            self._clear_temporaries()
            self.load()
            yield
        finally:
            os.close(fd)

    @staticmethod
    def _try_lock(fd: int) -> bool:
        with explained(f"{STATE}/lock"):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _clear_temporaries(self) -> None:
        for sub in ("", "generations", "original", "pages", "submitted", "keys"):
            with explained(STATE), self._folder(sub, create=True) as folder:
                clear(folder)

    @contextmanager
    def _folder(self, sub: str, *, create: bool = False) -> Iterator[int]:
        """Open a folder of the state directory, made first if asked; it must be ours alone to write."""
        path = STATE + ("/" + sub if sub else "")
        if create:
            self._make_folder(path, 0o700)
        fd = self.root.open_dir(path)
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise HostError(
                    f"{path} is not ours alone: owner {found.st_uid}, mode {found.st_mode & 0o7777:04o}",
                    f"look at who changed it, then: chown {os.geteuid()} {path} && chmod 0700 {path}",
                )
            yield fd
        finally:
            os.close(fd)

    def _make_folder(self, path: str, mode: int) -> None:
        """Make a folder durably, its parents too (0755); existing ones are left as they are."""
        if self.root.resolve(path).kind == "dir":
            return
        parent, _, name = path.rpartition("/")
        self._make_folder(parent or "/", 0o755)
        above = self.root.open_dir(parent or "/")
        try:
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=above)
                os.chmod(name, mode, dir_fd=above)  # whatever the umask
                os.fsync(above)
        finally:
            os.close(above)

    # -- the changes --------------------------------------------------------------------------------------------

    def save_journal(self, journal: j.Journal) -> None:
        """Replace the journal."""
        self._save(self.sub, "journal.json", j.to_json(journal))
        self.journal = journal

    def save_budget(self, budget: j.Budget) -> None:
        """Replace the budget."""
        self._save("", "budget.json", j.to_json(budget))
        self.budget = budget

    def _save(self, sub: str, name: str, data: bytes) -> None:
        with explained(f"{STATE}/{sub}/{name}".replace("//", "/")), self._folder(sub) as folder:
            write(folder, name, data, 0o600)

    def update(self, **changes: Any) -> None:
        """Save the journal with some fields changed."""
        self.save_journal(replace(self.journal, **changes))

    def proved(self, **changes: Any) -> None:
        """Note that what is installed was seen served."""
        installed = self.journal.installed
        self.update(proven=True, untried=False, installed=installed and replace(installed, unserved=False), **changes)

    def request(self, event: str, **changes: Any) -> None:
        """Move the request machine; `none` forgets everything about the request."""
        state = j.step(j.REQUEST, self.journal.request.state, event)
        moved = j.Request() if state == "none" else replace(self.journal.request, state=state, **changes)
        self.update(request=moved)

    def installation(self, event: str, *, also: Optional[Dict[str, Any]] = None, **changes: Any) -> None:
        """Move the installation machine; `settled` forgets everything about it. `also`: further journal fields."""
        state = j.step(j.INSTALLATION, self.journal.installation.state, event)
        moved = j.Installation() if state == "settled" else replace(self.journal.installation, state=state, **changes)
        self.update(installation=moved, **(also or {}))

    def add_generation(self, generation: Generation) -> None:
        """Keep a certificate that was obtained; one that is there already stays as it is."""
        sub = f"{self.sub}/generations".lstrip("/")
        final = f"{STATE}/{sub}/{generation.id}"
        known = {other.id: other.origin.number for other in self.generations()}
        origin = replace(generation.origin, number=max(known.values(), default=0) + 1)
        newest = known.get(generation.id, origin.number)
        self.update(newest=max(newest, *known.values(), 0))  # before: a run that is killed here is no backup that was restored
        with explained(final), self._folder(sub, create=True) as folder:
            if generation.id in known:
                return
            remove_tree(folder, generation.id)  # one that has lost a file
            temporary = TEMPORARY + secrets.token_hex(8)
            os.mkdir(temporary, 0o700, dir_fd=folder)
            inner = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                write(inner, "cert.pem", generation.certificate, 0o600)
                write(inner, "chain.pem", generation.chain, 0o600)
                write(inner, "meta.json", j.to_json(origin), 0o600)
            finally:
                os.close(inner)
            move(folder, temporary, generation.id)

    def begin_errand(self, name: str) -> None:
        """Turn to the journal and the generations of one CSR of another host; lock, budget and all else stay this host's.

        The oldest ones are removed of which nothing is waited for.
        """
        self.sub = f"submitted/{name}"
        for sub in (self.sub, f"{self.sub}/generations"):
            with explained(self.path), self._folder(sub, create=True) as folder:
                clear(folder)
        with explained(f"{STATE}/submitted"), self._folder("submitted") as folder:
            names = sorted(os.listdir(folder), key=lambda name: os.stat(name, dir_fd=folder).st_mtime_ns)
            for old in names[:-KEPT_ERRANDS]:
                if self._load(j.Journal, f"{STATE}/submitted/{old}/journal.json").request.state == "none" and old != name:
                    remove_tree(folder, old)
        self.load()

    def waiting_errands(self) -> Tuple[j.Request, ...]:
        """Return the requests of other hosts that are not settled."""
        aside = Store(self.root.aside())  # no decision rests on them
        names = aside.root.listdir(f"{STATE}/submitted")
        found = (aside._load(j.Journal, f"{STATE}/submitted/{name}/journal.json").request for name in names)
        return tuple(request for request in found if request.state != "none")

    def deliver(self, path: str, data: bytes) -> None:
        """Write a file that the operator named, whole or not at all, readable by everybody as a certificate may be."""
        with self.beside.folder(path) as (folder, name):
            write(folder, name, data, 0o644)

    def prune(self) -> None:
        """Remove the oldest generations and saved originals that nothing in the journal refers to."""
        entry = self.journal
        places = (entry.installed, entry.before, entry.original, entry.installation.target, entry.installation.previous)
        kept = {place.generation for place in places if place} | {skip.generation for skip in entry.skipped}
        with explained(self.path), self._folder(f"{self.sub}/generations".lstrip("/"), create=True) as folder:
            for old in self.generations()[:-KEPT_GENERATIONS]:
                if old.id not in kept:
                    remove_tree(folder, old.id)
            os.fsync(folder)
        if not self.sub:
            self._keep_newest("original", KEPT_ORIGINALS, frozenset(place.saved for place in places if place))

    def _keep_newest(self, sub: str, count: int, kept: "frozenset[str]" = frozenset()) -> None:
        with explained(f"{STATE}/{sub}"), self._folder(sub, create=True) as folder:
            ours = filter(_KEPT.fullmatch, os.listdir(folder))
            names = sorted(ours, key=lambda name: os.stat(name, dir_fd=folder).st_mtime_ns)
            for name in names[:-count]:
                if name not in kept:
                    os.unlink(name, dir_fd=folder)
            os.fsync(folder)

    def save_original(self, data: bytes, sha256: str) -> str:
        """Keep bytes that an installation replaces; returns their name in original/."""
        name = f"{sha256}.pem"
        with explained(f"{STATE}/original/{name}"), self._folder("original", create=True) as folder:
            write(folder, name, data, 0o600)
        return name

    def save_key(self, spki: str, pem: bytes, *, old: bool = False) -> None:
        """Keep a private key, for root alone."""
        path = self.key_path(spki, old=old)
        with explained(path), self._folder("keys", create=True) as folder:
            write(folder, path.rpartition("/")[2], pem, 0o600)

    def drop_keys(self, kept: "frozenset[str]") -> None:
        """Remove every key but those that wait for their certificates and are in `kept` (SPKI hashes): an old key must not live on."""
        with explained(f"{STATE}/keys"), self._folder("keys", create=True) as folder:
            gone = [m[0] for m in map(_KEY.fullmatch, os.listdir(folder)) if m and (m[2] or m[1] not in kept)]
            for name in gone:
                os.unlink(name, dir_fd=folder)
            if gone:
                os.fsync(folder)

    def drop_originals(self) -> None:
        """Remove every saved file that holds a private key besides certificates: the agent's key is another one now."""
        for name in filter(_KEPT.fullmatch, self.root.listdir(f"{STATE}/original")):
            if b"PRIVATE KEY-----" in self.original(name):
                with explained(f"{STATE}/original/{name}"), self._folder("original") as folder:
                    os.unlink(name, dir_fd=folder)
                    os.fsync(folder)

    def save_page(self, skeleton: str, now: int) -> str:
        """Keep the skeleton of a page that was not recognised; returns its path."""
        name = f"{now}.html"
        with explained(f"{STATE}/pages/{name}"), self._folder("pages", create=True) as folder:
            write(folder, name, skeleton.encode("utf-8", "replace"), 0o600)
        self._keep_newest("pages", KEPT_PAGES)
        return f"{STATE}/pages/{name}"

    def publish(self, status: str) -> None:
        """Say to anyone on the host what this run found; not durable, since it is made anew at each run."""
        aside = Store(self.root.aside())
        with explained(STATUS):
            aside._make_folder(STATUS_FOLDER, 0o755)
            folder = aside.root.open_dir(STATUS_FOLDER)
            try:
                clear(folder)
                write(folder, STATUS_NAME, status.encode("utf-8", "backslashreplace"), 0o644)
            finally:
                os.close(folder)

    def set_aside(self, fresh: j.Journal) -> str:
        """Move another machine's state to foreign/, and begin with a fresh journal; the budget stays. Returns where it is now."""
        self.drop_originals()  # another machine's secret
        with explained(f"{STATE}/foreign"), self._folder("foreign", create=True) as above:
            number = max((int(name) for name in os.listdir(above) if name.isdigit()), default=0) + 1
        path = f"{STATE}/foreign/{number}"
        with explained(path), self._folder(f"foreign/{number}", create=True) as aside, self._folder("") as folder:
            os.link("journal.json", "journal.json", src_dir_fd=folder, dst_dir_fd=aside)  # it counts until the fresh one is there
            for name in (*_ONES_OWN, PREMISES):
                with suppress(FileNotFoundError):
                    move_tree(folder, name, aside)
            remove_tree(folder, _KEYS)  # copies of what is another machine's secret
            os.fsync(aside)
            os.fsync(folder)
        self.save_journal(fresh)
        return path

    def empty(self) -> None:
        """Remove what an image needs nothing of: certificates obtained or replaced, pages, requests of other hosts."""
        with explained(STATE), self._folder("") as folder:
            for name in (*_ONES_OWN, _KEYS):
                remove_tree(folder, name)
            with suppress(FileNotFoundError):
                os.unlink(PREMISES, dir_fd=folder)
            os.fsync(folder)

    def save_premises(self, premises: bytes) -> None:
        """Leave what this run's answer rests on for the next; needs no lock, since the lock's time is among it."""
        with explained(f"{STATE}/{PREMISES}"), self._folder("") as folder:
            write(folder, PREMISES, premises, 0o600)

    def check_state(self) -> None:
        """See that the state directory can be written and has space. Raises HostError."""
        self.beside.check_folder(f"{STATE}/journal.json")
